// The page: what was chosen, what came back, and how both are shown. One answer at a time.

import { boxEditor } from "./boxes.js";
import { $, clamp, make, pixelUnder } from "./elements.js";
import { runJob } from "./jobs.js";
import { paintLabels, paintMap, scale } from "./pictures.js";
import { infer, refusal } from "./protocol.js";
import { drawScene } from "./scene.js";

const IN_NATS = ["entropy", "mutual_information", "expected_entropy", "seam"];
const IN_SHARES = ["confidence", "margin"];
const PROBABILITY_BYTES = 64e6; // above it the answer comes without them: a browser's tab has little memory
const VIEWS = ["image", "labels", "uncertainty"];

let picture, bitmap, card, maps, answer, pixel, running;
const boxes = boxEditor(() => ({ bitmap, drawAgain: drawImage }));


function headers() {
  const key = $("key").value || sessionStorage.getItem("penumbra-key") || "";
  if (key) sessionStorage.setItem("penumbra-key", key);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function loadModels() {
  const { models } = await (await ask("models")).json();
  maps = Object.fromEntries(models.map(({ name, maps }) => [name, maps]));
  $("model").replaceChildren(...models.map(({ name }) => new Option(name)));
  await chooseModel();
}

async function chooseModel() {
  card = await (await ask(`models/${encodeURIComponent($("model").value)}`)).json();
  const { sampling, prompt, calibration } = card, isFree = ["latent", "dropout"].includes(sampling.kind);
  $("about").textContent = `${card.method}, version ${card.version}: ${aboutSamples(sampling)}`;
  $("samples-row").hidden = $("seed-row").hidden = !isFree;
  $("samples").value = $("samples-shown").value = sampling.default_samples;
  const turns = card.window.height === card.window.width ? ["none", "flip", "d4", "scales"] : ["none", "flip", "scales"];
  $("views").replaceChildren(...turns.map((name) => new Option(name)));
  $("views").value = card.views;
  for (const [id, risks] of [["risk", calibration?.risks ?? []], ["class-risk", calibration?.class_risks ?? []]]) {
    $(`${id}-row`).hidden = !risks.length;
    $(id).replaceChildren(new Option("not bounded", ""), ...risks.map((risk) => new Option(`${100 * risk} %`, risk)));
  }
  $("boxes-row").hidden = prompt.kind !== "boxes";
  $("tags-row").hidden = prompt.kind !== "tags";
  boxes.begin(card.classes);
  $("tags").replaceChildren(...card.classes.map(({ name }) => make("label", {}, make("input", { type: "checkbox", value: name }), ` ${name}`)));
  forget();
  listMaps(mapsOfAnswer());
}

/** The maps that an answer to what is chosen has. */
function mapsOfAnswer() {
  const free = !$("samples-row").hidden, members = Object.keys(prompt()).length ? card.prompt.members.length : 0;
  const samples = free ? Number($("samples").value) : members || card.sampling.default_samples;
  const isOne = samples === 1 && $("views").value === "none", { single, several } = maps[card.name];
  const [absent, present] = isOne ? ["mutual_information", "seam"] : ["seam", "mutual_information"];
  return (single ?? several).map((name) => (name === absent ? present : name));
}

/** Offers these maps; the one that is shown stays, if it is among them. */
function listMaps(names) {
  const shown = names.includes($("map").value) ? $("map").value : "entropy";
  $("map").replaceChildren(...names.map((name) => new Option(name.replaceAll("_", " "), name)));
  $("map").value = shown;
}

function aboutSamples({ kind, members }) {
  if (members.length > 1) return `samples are ${members.join(", ")}`;
  return { latent: "each sample draws a latent", dropout: "each sample drops other channels" }[kind] ?? "one pass, no samples";
}

function options() {
  const chosen = { seed: Number($("seed").value), views: $("views").value };
  if (!$("samples-row").hidden) chosen.samples = Number($("samples").value);
  if ($("risk").value) chosen.max_risk = Number($("risk").value);
  if ($("class-risk").value) chosen.max_class_risk = Number($("class-risk").value);
  return chosen;
}

/** What a model with a prompt is told, or nothing: {boxes} or {tags}. */
function prompt() {
  const tags = [...$("tags").querySelectorAll(":checked")].map((box) => box.value), rows = boxes.rows();
  if (!$("tags-row").hidden && tags.length) return { tags };
  if (!$("boxes-row").hidden && rows.length) return { boxes: rows };
  return {};
}

async function take(file) {
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return say(`this browser cannot show ${file.name || "that file"}; choose a JPEG, PNG or WebP`, true);
  }
  [picture, pixel] = [file, undefined];
  boxes.clear();
  forget();
  await segment();
}

async function segment() {
  if (!picture || !card) return;
  running?.abort();
  const mine = (running = new AbortController());
  const names = mapsOfAnswer(), outputs = ["labels", ...names];
  if (4 * bitmap.width * bitmap.height * card.classes.length <= PROBABILITY_BYTES) outputs.push("probabilities");
  const started = performance.now();
  say("Segmenting …");
  $("job-row").hidden = true;
  try {
    const response = await infer(card.name, picture, {
      parameters: options(), outputs, prompt: prompt(), headers: headers(), signal: mine.signal,
    });
    answer = { ...response, ms: performance.now() - started };
    listMaps(names);
    say(outcome());
    show();
  } catch (error) {
    if (error.name === "AbortError") return;
    forget();
    $("job-row").hidden = error.status !== 413;
    refused(error);
  }
}

function refused(error) {
  if (error.status === 401 || error.status === 403) $("key-row").hidden = false;
  say(error.message, true);
}

function outcome() {
  const { samples, seed, members, abstained } = answer.parameters, others = warnings().filter((sentence) => !isStrange(sentence));
  const parts = [members ? `Done with ${members.replaceAll(",", ", ")}.` : `Done with ${samples} sample${samples > 1 ? "s" : ""}, seed ${seed}.`];
  if (abstained !== undefined) parts.push(`${(100 * abstained).toFixed(1)} % withheld.`);
  return [...parts, ...(others.length ? [`${others.join("; ")}.`] : [])].join(" ");
}

const warnings = () => (answer.parameters.warnings ?? "").split("; ").filter(Boolean);
const isStrange = (sentence) => sentence.startsWith("this picture is stranger than");

function say(text, isWrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", isWrong);
}


function forget() {
  answer = undefined;
  $("run").disabled = !picture;
  for (const id of ["labels", "uncertainty"]) Object.assign($(id), { width: bitmap?.width ?? 4, height: bitmap?.height ?? 3 });
  $("strange").hidden = true;
  for (const id of ["legend", "scores", "timing", "scale"]) $(id).replaceChildren();
  drawImage();
  inspect();
}

function showScores() {
  const { expected_error: error, novelty } = answer.parameters;
  const rows = [["expected error", error], ["stranger than, of the reference", novelty]].filter(([, share]) => share !== undefined);
  $("scores").replaceChildren(...rows.map(([name, share]) => row(name, `${(100 * share).toFixed(1)} %`)));
  const strange = warnings().find(isStrange);
  $("strange").textContent = strange ? `${strange[0].toUpperCase()}${strange.slice(1)}.` : "";
  $("strange").hidden = !strange;
}

function show() {
  const { labels } = answer.tensors;
  paintLabels($("labels"), labels.shape, labels.values, card.classes);
  showMap();
  showClasses();
  showScores();
  const rows = [...answer.phases.map(([name, ms]) => [`server: ${name.replaceAll("_", " ")}`, ms]), ["as seen here", answer.ms]];
  $("timing").replaceChildren(...rows.map(([name, ms]) => row(name, `${ms.toFixed(1)} ms`)));
}

function top(name, values) {
  if (IN_SHARES.includes(name)) return 1;
  return values.reduce((most, value) => (value > most ? value : most), 1e-6);
}

function showMap() {
  if (!answer) return;
  const name = $("map").value, { shape, values } = answer.tensors[name], most = top(name, values);
  paintMap($("uncertainty"), shape, values, most);
  const ramp = make("span", { className: "ramp" });
  ramp.style.background = scale();
  const unit = IN_NATS.includes(name) ? " nats" : "";
  $("scale").replaceChildren("0 ", ramp, ` ${most.toPrecision(3)}${unit}`);
  drawImage();
  inspect();
}

function drawImage() {
  if (!bitmap) return;
  const canvas = $("image"), pen = canvas.getContext("2d"), over = $("over").value;
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  pen.drawImage(bitmap, 0, 0);
  if (answer && over !== "none") {
    pen.globalAlpha = $("opacity").value / 100;
    pen.drawImage($(over === "labels" ? "labels" : "uncertainty"), 0, 0);
    pen.globalAlpha = 1;
  }
  boxes.draw(pen);
}

function showClasses() {
  const { labels, entropy } = answer.tensors, count = new Float64Array(256), sum = new Float64Array(256);
  labels.values.forEach((label, i) => {
    count[label] += 1;
    sum[label] += entropy.values[i];
  });
  const present = [...count.keys()].filter((k) => count[k]).sort((a, b) => count[b] - count[a]);
  $("legend").replaceChildren(...present.map((k) => {
    const share = `${((100 * count[k]) / labels.values.length).toFixed(1)} %`;
    return row(className(k), share, Number.isNaN(sum[k]) ? "" : `${(sum[k] / count[k]).toFixed(3)} nats`); // void has none
  }));
}

/** A class's name beside its colour. */
function className(label) {
  const known = card.classes[label], swatch = make("span", { className: known ? "swatch" : "swatch striped" });
  if (known) swatch.style.background = `rgb(${known.color})`;
  return make("span", {}, swatch, known?.name ?? "no label");
}

function row(...cells) {
  return make("tr", {}, ...cells.map((content) => make("td", {}, content)));
}


function inspect() {
  for (const cross of document.querySelectorAll(".cross")) {
    cross.style.display = pixel && bitmap ? "block" : "none";
    if (pixel && bitmap) Object.assign(cross.style, {
      left: `${(100 * (pixel.x + 0.5)) / bitmap.width}%`, top: `${(100 * (pixel.y + 0.5)) / bitmap.height}%`,
    });
  }
  if (!pixel || !answer) return $("pixel").replaceChildren(quiet("Click a picture, or move over it with the arrow keys."));
  const { labels, probabilities } = answer.tensors, [height, width] = labels.shape;
  const at = pixel.y * width + pixel.x;
  const rows = [...$("map").options].map(({ value: name, text }) => row(text, answer.tensors[name].values[at].toFixed(4)));
  if (probabilities) {
    const shares = card.classes.map((_, k) => probabilities.values[k * height * width + at]);
    const bar = (share) => make("span", {}, make("meter", { value: share }), ` ${share.toFixed(4)}`);
    for (const k of [...shares.keys()].sort((a, b) => shares[b] - shares[a])) rows.push(row(className(k), bar(shares[k])));
  } else rows.push(row("probabilities", "not for pictures of this size"));
  $("pixel").replaceChildren(quiet(`x ${pixel.x}, y ${pixel.y}: `, className(labels.values[at])), make("table", {}, ...rows));
}

function quiet(...content) {
  return make("p", { className: "quiet" }, ...content);
}

function move(x, y) {
  pixel = { x: clamp(Math.floor(x), 0, bitmap.width - 1), y: clamp(Math.floor(y), 0, bitmap.height - 1) };
  inspect();
}

function step(event) {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
  if (dx === undefined || !bitmap) return;
  event.preventDefault();
  const from = pixel ?? { x: bitmap.width >> 1, y: bitmap.height >> 1 }, far = event.shiftKey ? 10 : 1;
  move(from.x + far * dx, from.y + far * dy);
}


function begin() {
  $("file").addEventListener("change", (event) => event.target.files[0] && take(event.target.files[0]));
  $("sample").addEventListener("click", async () => take(await drawScene()));
  document.addEventListener("paste", (event) => event.clipboardData.files[0] && take(event.clipboardData.files[0]));
  const drop = (event, isOver) => {
    event.preventDefault();
    $("drop").classList.toggle("over", isOver);
  };
  document.addEventListener("dragover", (event) => drop(event, true));
  document.addEventListener("dragleave", (event) => drop(event, false));
  document.addEventListener("drop", (event) => {
    drop(event, false);
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  $("model").addEventListener("change", () => chooseModel().then(segment).catch(refused));
  $("samples").addEventListener("input", () => ($("samples-shown").value = $("samples").value));
  $("map").addEventListener("change", showMap);
  $("over").addEventListener("change", drawImage);
  $("opacity").addEventListener("input", drawImage);
  $("key").addEventListener("change", () => loadModels().then(segment).catch(refused));
  $("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    segment();
  });
  $("job").addEventListener("click", () => runJob({ picture, model: card.name, options: options(), prompt: prompt(), ask, say }).catch(refused));
  for (const id of VIEWS) {
    $(id).addEventListener("click", (event) => bitmap && move(...pixelUnder($(id), event, bitmap)));
    $(id).addEventListener("keydown", step);
  }
  loadModels().catch(refused);
}

begin();
