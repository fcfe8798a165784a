// The Open Inference Protocol v2 over HTTP with binary tensors: what any other client speaks.

const HEADER_LENGTH = "Inference-Header-Content-Length";
const READERS = { UINT8: Uint8Array, FP32: Float32Array };

/** Sends an encoded picture. prompt: {boxes: rows} or {tags: names}. Resolves to {tensors: {name: {shape, values}}, parameters, phases}. */
export async function infer(model, picture, { parameters, outputs, prompt, headers, signal }) {
  const bytes = new Uint8Array(await picture.arrayBuffer());
  const image = { name: "image", shape: [1], datatype: "BYTES", parameters: { binary_data_size: bytes.length + 4 } };
  const requested = outputs.map((name) => ({ name, parameters: { binary_data: true } }));
  const head = new TextEncoder().encode(JSON.stringify({ inputs: [image, ...Object.entries(prompt).map(tensor)], outputs: requested, parameters }));
  const length = new Uint8Array(4);
  new DataView(length.buffer).setUint32(0, bytes.length, true);
  const answer = await fetch(`v2/models/${encodeURIComponent(model)}/infer`, {
    method: "POST",
    body: new Blob([head, length, bytes]),
    headers: { ...headers, "Content-Type": "application/octet-stream", [HEADER_LENGTH]: head.length },
    signal,
  });
  if (!answer.ok) throw await refusal(answer);
  return decode(answer.headers, await answer.arrayBuffer());
}

function tensor([name, values]) {
  if (name === "tags") return { name, shape: [values.length], datatype: "BYTES", data: values };
  return { name, shape: [values.length, 5], datatype: "FP32", data: values };
}

/** An Error with the server's sentence and its status. */
export async function refusal(answer) {
  const { error } = await answer.json().catch(() => ({}));
  return Object.assign(new Error(error ?? `the server answered ${answer.status}`), { status: answer.status });
}

function decode(headers, body) {
  let place = Number(headers.get(HEADER_LENGTH));
  const document = JSON.parse(new TextDecoder().decode(body.slice(0, place)));
  const tensors = {};
  for (const { name, datatype, shape, parameters } of document.outputs) {
    const raw = body.slice(place, (place += parameters.binary_data_size));
    tensors[name] = { shape, values: new READERS[datatype](raw) };
  }
  return { tensors, parameters: document.parameters, phases: phases(headers.get("Server-Timing") ?? "") };
}

/** "run;dur=1.5, queue;dur=2" to [["run", 1.5], ["queue", 2]]. */
function phases(timing) {
  return [...timing.matchAll(/([\w-]+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]);
}
