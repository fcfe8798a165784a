// How the server is asked: by the Open Inference Protocol v2 for exact tensors, and line by line for large pictures.

const HEADER_LENGTH = "Inference-Header-Content-Length";
const READERS = { UINT8: Uint8Array, FP32: Float32Array };
const LEVELS = 256;

const kept = () => sessionStorage.getItem("penumbra-key") ?? "";

/** Asks with this key from now on, in this tab. */
export const keepKey = (key) => sessionStorage.setItem("penumbra-key", key.replace(/[^!-~]/g, ""));

/** Whether there is a key to ask with. */
export const hasKey = () => Boolean(kept());

/** fetch with the key, that throws what is refused: an Error with the server's sentence, its status and the seconds to
    wait where it says any. */
export async function ask(path, options = {}) {
  const key = kept() ? { Authorization: `Bearer ${kept()}` } : {};
  const answer = await fetch(path, { ...options, headers: { ...key, ...options.headers } });
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  const again = answer.headers.get("Retry-After") ?? "", wait_s = /^\d+$/.test(again) ? Number(again) : undefined;
  throw Object.assign(new Error(error ?? `the server answered ${answer.status}`), { status: answer.status, wait_s });
}

/** The options of a request as `POST /segment` and `POST /jobs` read them. prompt: {boxes: rows} or {tags: names}. */
export function queryOf({ model, version, options, prompt }, extra = {}) {
  const prompts = Object.entries(prompt).map(([name, rows]) => [name, JSON.stringify(rows)]);
  return new URLSearchParams({ model, version, ...options, ...Object.fromEntries(prompts), ...extra });
}

/** An answer of POST /segment in a media type. */
export function segmentAs(media, picture, request, extra, signal) {
  const headers = { "Content-Type": picture.type || "application/octet-stream", Accept: media };
  return ask(`segment?${queryOf(request, extra)}`, { method: "POST", body: picture, headers, signal });
}

/** Sends an encoded picture. Resolves to {tensors: {name: {shape, values}}, facts}. */
export async function infer(picture, { model, version, options, prompt }, outputs, signal) {
  const bytes = new Uint8Array(await picture.arrayBuffer());
  const image = { name: "image", shape: [1], datatype: "BYTES", parameters: { binary_data_size: bytes.length + 4 } };
  const requested = outputs.map((name) => ({ name, parameters: { binary_data: true } }));
  const inputs = [image, ...Object.entries(prompt).map(tensor)];
  const head = new TextEncoder().encode(JSON.stringify({ inputs, outputs: requested, parameters: options }));
  const length = new Uint8Array(4);
  new DataView(length.buffer).setUint32(0, bytes.length, true);
  const answer = await ask(`v2/models/${encodeURIComponent(model)}/versions/${version}/infer`, {
    method: "POST", body: new Blob([head, length, bytes]), signal,
    headers: { "Content-Type": "application/octet-stream", [HEADER_LENGTH]: head.length },
  });
  return decode(answer.headers, await answer.arrayBuffer());
}

function tensor([name, values]) {
  if (name === "tags") return { name, shape: [values.length], datatype: "BYTES", data: values };
  return { name, shape: [values.length, 5], datatype: "FP32", data: values };
}

function decode(headers, body) {
  let place = Number(headers.get(HEADER_LENGTH));
  const { outputs, parameters } = JSON.parse(new TextDecoder().decode(body.slice(0, place)));
  const tensors = {};
  for (const { name, datatype, shape, parameters } of outputs) {
    const raw = body.slice(place, (place += parameters.binary_data_size));
    tensors[name] = { shape, values: new READERS[datatype](raw) };
  }
  const phases = [...(headers.get("Server-Timing") ?? "").matchAll(/([\w-]+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]);
  const [members, warnings] = [parameters.members?.split(",") ?? [], parameters.warnings?.split("; ") ?? []];
  return { tensors, facts: { ...parameters, members, warnings, phases } };
}

/** Sends an encoded picture and takes its answer band by band. progress({windows_done, windows}). band(one).
    Resolves to the facts. */
export async function follow(picture, request, { outputs, signal, progress, band }) {
  const answer = await segmentAs("application/x-ndjson", picture, request, { outputs: outputs.join(), levels: LEVELS }, signal);
  let facts;
  for await (const line of linesOf(answer.body)) {
    if (line.error) throw new Error(line.error);
    if ("y0" in line) band(await bandOf(line));
    else if ("windows_done" in line) progress(line);
    else facts = { ...line, ...line.scores, phases: Object.entries(line.timing_ms) };
  }
  return facts;
}

async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = [];
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const lines = value.split("\n");
    rest.push(lines[0]);
    for (const next of lines.slice(1)) {
      yield JSON.parse(rest.join(""));
      rest = [next];
    }
  }
}

async function bandOf({ y0, rows, labels, maps }) {
  const own = await Promise.all(Object.entries(maps).map(async ([name, { white, black, png }]) => [name, { values: (await grey(png)).values, step: (white - black) / 255, base: black }]));
  const { values, width } = await grey(labels);
  return { y0, height: rows, width, labels: values, maps: Object.fromEntries(own) };
}

/** The grey levels of a PNG in base64. */
async function grey(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }), { colorSpaceConversion: "none" });
  const { width, height } = bitmap, canvas = new OffscreenCanvas(width, height), pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = pen.getImageData(0, 0, width, height), values = new Uint8Array(width * height);
  for (let i = 0; i < values.length; i++) values[i] = data[4 * i];
  return { values, width };
}
