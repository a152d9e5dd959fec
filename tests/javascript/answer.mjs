// Answers one question about one picture with transformers.js, greedily; Node and the browser share it.
// Returns what plain JSON carries: token ids of the prompt and of the answer, and the answer's text.
export async function answer(transformers, { bundle, dtype, picture, question, tokensPerPicture, newTokens }) {
  const { AutoProcessor, LlavaForConditionalGeneration, load_image } = transformers;
  const model = await LlavaForConditionalGeneration.from_pretrained(bundle, { dtype });
  const processor = await AutoProcessor.from_pretrained(bundle);
  const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text: question }] }];
  const prompt = processor.tokenizer
    .apply_chat_template(messages, { tokenize: false, add_generation_prompt: true })
    .replaceAll("<image>", "<image>".repeat(tokensPerPicture));
  const image = await load_image(picture);
  const inputs = { ...processor.tokenizer(prompt), ...(await processor.image_processor(image)) };
  const output = await model.generate({ ...inputs, max_new_tokens: newTokens, do_sample: false });
  const written = output.slice(null, [inputs.input_ids.dims[1], null]);
  const numbers = (tensor) => tensor.tolist()[0].map(Number);
  return {
    prompt: numbers(inputs.input_ids),
    answer: numbers(written),
    text: processor.batch_decode(written, { skip_special_tokens: true })[0],
  };
}
