// node node.mjs FOLDER REQUEST: REQUEST is JSON for answer(); its bundle is a folder's name under FOLDER.
import * as transformers from "@huggingface/transformers";
import { answer } from "./answer.mjs";

const [folder, request] = process.argv.slice(2);
transformers.env.allowRemoteModels = false;
transformers.env.localModelPath = folder + "/";
console.log(JSON.stringify(await answer(transformers, JSON.parse(request))));
