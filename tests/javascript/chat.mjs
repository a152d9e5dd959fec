// node chat.mjs ADDRESS KEY MODEL PICTURE: asks a server through OpenAI's client and prints, as JSON, what came.
import OpenAI from "openai";

const [baseURL, apiKey, model, picture] = process.argv.slice(2);
const options = { baseURL, maxRetries: 0, timeout: 60_000 };
const client = new OpenAI({ ...options, apiKey });
const ask = (content, more) => ({ model, max_tokens: 12, messages: [{ role: "user", content }], ...more });
const about = [
  { type: "image_url", image_url: { url: picture } },
  { type: "text", text: "What do you see?" },
];

async function streamed(body) {
  const pieces = [];
  let logprobs = [];
  let last;
  for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
    last = chunk.choices[0];
    pieces.push(last.delta.content ?? "");
    logprobs = logprobs.concat(last.logprobs?.content ?? []);
  }
  return { pieces, logprobs, reason: last.finish_reason };
}

async function failure(caller, body) {
  const error = await caller.chat.completions.create(body).catch((thrown) => thrown);
  return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
}

const names = [];
for await (const found of client.models.list()) names.push(found.id);
console.log(
  JSON.stringify({
    models: names,
    whole: await client.chat.completions.create(ask("Hi", { logprobs: true })),
    stream: await streamed(ask("Hi", { logprobs: true })),
    picture: await client.chat.completions.create(ask(about)),
    unknown: await failure(client, ask("Hi", { best_of: 2 })),
    closed: await failure(new OpenAI({ ...options, apiKey: "wrong" }), ask("Hi")),
  }),
);
