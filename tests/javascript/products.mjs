// node products.mjs < REQUEST: the sums of a model of one product, in ONNX Runtime for browsers (wasm) and for Node.
import { readFileSync } from "node:fs";
import * as native from "onnxruntime-node";
import * as wasm from "onnxruntime-web/wasm";

const { model, activations, shape } = JSON.parse(readFileSync(0, "utf8"));
wasm.env.wasm.numThreads = 1;

async function sums(ort) {
  const session = await ort.InferenceSession.create(new Uint8Array(Buffer.from(model, "base64")));
  const given = new ort.Tensor("uint8", new Uint8Array(Buffer.from(activations, "base64")), shape);
  return Array.from((await session.run({ activations: given })).sums.data);
}
console.log(JSON.stringify({ wasm: await sums(wasm), native: await sums(native) }));
