"""The card's part for phones: what to ship, what the app does itself, and how it calls onnxruntime.

Neither Kotlin nor Swift is compiled by a test; the names are those of onnxruntime's Java and Objective-C interfaces.
"""

import json
import textwrap
from string import Template

from ..contract.bundle import DECODER, GRAPHS, PORTABLE, Bundle, Manifest
from .ort_files import FOLDER, OPERATORS, has_ort_files

_TEXT = Template("""\
$files

The app itself has to do what the Python script above does around the graphs, in its numbers: the picture to pixels, the
question into the prompt, the prompt to ids (by a library that reads `tokenizer.json`, and $special),
features in the places of the image tokens, and the loop over tokens. Compare with the script before you trust either.

$accelerators

Android, in Kotlin, with `com.microsoft.onnxruntime:onnxruntime-android`:

```kotlin
import ai.onnxruntime.*
import java.nio.*

// folder: String, the bundle's; pixels: FloatArray, $channels x $height x $width, channels first; ids: LongArray
val env = OrtEnvironment.getEnvironment()
val (vision, embed, decoder) = listOf(
    $graphs,
).map { env.createSession("$$folder/$$it", OrtSession.SessionOptions()) }
fun floats(data: FloatArray, vararg shape: Long) = OnnxTensor.createTensor(env, FloatBuffer.wrap(data), shape)
fun longs(data: LongArray, vararg shape: Long) = OnnxTensor.createTensor(env, LongBuffer.wrap(data), shape)
fun read(value: OnnxValue): FloatArray {
    val buffer = (value as OnnxTensor).floatBuffer
    return FloatArray(buffer.remaining()).also { buffer.get(it) }
}

val features = vision.run(mapOf("pixel_values" to floats(pixels, 1, $channels, $height, $width))).use { read(it[0]) }
val embeds = embed.run(mapOf("input_ids" to longs(ids, 1, ids.size.toLong()))).use { read(it[0]) }
// Copy `features` over the $hidden numbers of every id $image_token_id. At first `length` is 0 and the cache empty:
var past = decoder.inputNames.filter { it.startsWith("past_key_values.") }
    .associateWith { floats(FloatArray(0), 1, $kv_heads, 0, $head_dim) }
// The prompt in one step, then every token in a step of its own:
val new = embeds.size / $hidden
val result = decoder.run(past + mapOf(
    "inputs_embeds" to floats(embeds, 1, new.toLong(), $hidden),
    "attention_mask" to longs(LongArray(length + new) { 1 }, 1, (length + new).toLong()),
$kotlin_positions    "num_logits_to_keep" to longs(longArrayOf(1)),  // a scalar
))
val logits = read(result["logits"].get())  // the place of the largest is the next token; $eos ends the answer
past = past.keys.associateWith { result[it.replace("past_key_values", "present")].get() as OnnxTensor }
length += new  // the result of the step before can be closed now, this one after the next; so can all inputs
```

iOS, in Swift, with the package `https://github.com/microsoft/onnxruntime-swift-package-manager` (or the pod
`onnxruntime-objc`, then `import onnxruntime_objc`):

```swift
import Foundation
import OnnxRuntimeBindings

// folder: String, the bundle's; pixels: [Float], $channels x $height x $width, channels first; ids: [Int64]
let env = try ORTEnv(loggingLevel: .warning)
let sessions = try [
    $graphs,
].map { try ORTSession(env: env, modelPath: "\\(folder)/\\($$0)", sessionOptions: nil) }
let (vision, embed, decoder) = (sessions[0], sessions[1], sessions[2])
func tensor<T>(_ values: [T], _ type: ORTTensorElementDataType, _ shape: [Int]) throws -> ORTValue {
    let data = values.withUnsafeBytes { NSMutableData(bytes: $$0.baseAddress, length: $$0.count) }
    if values.isEmpty { data.length = 8 }  // no numbers, but an address
    return try ORTValue(tensorData: data, elementType: type, shape: shape.map { NSNumber(value: $$0) })
}
func read(_ value: ORTValue?) throws -> [Float] {
    (try value!.tensorData() as Data).withUnsafeBytes { Array($$0.bindMemory(to: Float.self)) }
}

let features = try read(vision.run(
    withInputs: ["pixel_values": tensor(pixels, .float, [1, $channels, $height, $width])],
    outputNames: ["image_features"], runOptions: nil)["image_features"])
let embeds = try read(embed.run(
    withInputs: ["input_ids": tensor(ids, .int64, [1, ids.count])],
    outputNames: ["inputs_embeds"], runOptions: nil)["inputs_embeds"])
// Copy `features` over the $hidden numbers of every id $image_token_id. At first `length` is 0 and the cache empty:
var past: [String: ORTValue] = [:]
for name in try decoder.inputNames() where name.hasPrefix("past_key_values.") {
    past[name] = try tensor([Float](), .float, [1, $kv_heads, 0, $head_dim])
}
// The prompt in one step, then every token in a step of its own:
let new = embeds.count / $hidden
var inputs = past
inputs["inputs_embeds"] = try tensor(embeds, .float, [1, new, $hidden])
inputs["attention_mask"] = try tensor([Int64](repeating: 1, count: length + new), .int64, [1, length + new])
${swift_positions}inputs["num_logits_to_keep"] = try tensor([Int64(1)], .int64, [])  // a scalar
let result = try decoder.run(withInputs: inputs, outputNames: Set(decoder.outputNames()), runOptions: nil)
let logits = try read(result["logits"])  // the place of the largest is the next token; $eos ends the answer
for name in past.keys { past[name] = result[name.replacingOccurrences(of: "past_key_values", with: "present")] }
length += new
```
""")
_ACCELERATORS = """\
This runs on the phone's CPU. Whether NNAPI or CoreML would take a graph, onnxruntime's own checker tells:
`switchkd verify . --mobile`."""
_FUSED = """\
This runs on the phone's CPU: the decoder's operators are onnxruntime's own, which NNAPI and CoreML do not know."""
_KOTLIN_POSITIONS = '    "position_ids" to longs(LongArray(new) { (length + it).toLong() }, 1, new.toLong()),\n'
_SWIFT_POSITIONS = (
    'inputs["position_ids"] = try tensor((length..<(length + new)).map { Int64($0) }, .int64, [1, new])\n'
)


def mobile_text(bundle: Bundle, manifest: Manifest, *, adds_special_tokens: bool) -> str:
    """How the smallest precision with a float32 cache runs on a phone, or the default one where none has such."""
    model = manifest.model
    fit = [name for name in manifest.precisions if manifest.cache_dtype(name) == "float32"]
    chosen = min(fit or manifest.precisions, key=lambda name: sum(manifest.graph_bytes(name).values()))
    graphs = [bundle.graph(name, chosen) for name in GRAPHS]
    files = [*(name for graph in graphs for name in (graph.file, *graph.data)), bundle.tokenizer_path.name]
    portable = bundle.graph(DECODER, chosen).form == PORTABLE
    channels, height, width = model.picture_shape
    return _TEXT.substitute(
        special="with its special tokens" if adds_special_tokens else "without adding special tokens",
        files=textwrap.fill(_files(manifest, chosen, files), 120, break_on_hyphens=False),
        accelerators=_ACCELERATORS if portable else _FUSED,
        graphs=",\n    ".join(json.dumps(graph.file) for graph in graphs),
        channels=channels,
        height=height,
        width=width,
        hidden=model.hidden_size,
        image_token_id=model.image_token_id,
        kv_heads=model.cache.kv_heads,
        head_dim=model.cache.head_dim,
        eos=" or ".join(map(str, model.eos_token_ids)),
        kotlin_positions=_KOTLIN_POSITIONS if portable else "",
        swift_positions=_SWIFT_POSITIONS if portable else "",
    )


def _files(manifest: Manifest, precision: str, files: list[str]) -> str:
    """What to ship, and why in this precision."""
    half = [name for name in manifest.precisions if manifest.cache_dtype(name) != "float32"]
    names, size = ", ".join(f"`{name}`" for name in files), sum(manifest.files[name].bytes for name in files)
    text = (
        f"Ship {names}: {size / 1e6:.1f} MB. Copy them out of the app's package into its folder of files: graphs are "
        "opened by path, and weights that lie beside a graph are found there. "
        f"`{precision}` is the smallest precision of this bundle"
    )
    if precision in half:
        text += (
            ". Its KV cache is float16: Kotlin hands over a `ShortBuffer` with `OnnxJavaType.FLOAT16` in place of "
            "floats. Swift cannot, for the Objective-C interface has no such type: export `int8` or `q4` too"
        )
    elif half:
        text += " with a float32 KV cache; the Objective-C interface, and so Swift, has no float16"
    if has_ort_files(manifest):
        text += (
            f". For a minimal build of onnxruntime take the files of the same names in `{FOLDER}/`, and build it with "
            f"`--include_ops_by_config {FOLDER}/{OPERATORS}`"
        )
    return f"{text}."
