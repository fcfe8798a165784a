// The page: what was chosen, what came back, and how both are shown. One answer at a time.

import { scaleOf, titleOf, wholeBand } from "./answer.js";
import { boxEditor } from "./boxes.js";
import { offerDownloads, showCode } from "./downloads.js";
import { endDraws, showDraws } from "./draws.js";
import { $ } from "./elements.js";
import { hasJob, runJob } from "./jobs.js";
import { makeLegend } from "./legend.js";
import { colorsOf, isSafePossible, paintLabels, paintMap } from "./paint.js";
import { ask, follow, hasKey, infer, keepKey } from "./protocol.js";
import { isFree, mapsOf, offerSettings, promise, readRequest } from "./settings.js";
import { outcome, sayIn, showBanner, showHover, showPixel, showScale, showTimes } from "./show.js";
import { makeView } from "./view.js";

const EXACT_BYTES = 64e6; // of probabilities; above it the answer comes in bands and without them, as a tab has little memory
const LARGE_PIXELS = 2e6; // above it samples are not shown side by side
const TICK_MS = 100;

let picture, bitmap, taking, card, answer, running;
const size = () => bitmap && [bitmap.width, bitmap.height];
const boxes = boxEditor({ size, changed: settingsChanged });
const legend = makeLegend(repaintLabels);
const view = makeView({
  size, draw, tool: boxes.tool, picked: inspect, hovered: (pixel) => showHover(answer, pixel, $("map").value, card?.classes),
});

const colors = () => colorsOf(card.classes, $("safe").checked);
const request = () => readRequest(card, boxes.rows());
const say = sayIn("status"), sayOfJob = sayIn("job-status");

async function loadModels() {
  const { models } = await (await ask("models")).json();
  const names = new Set(models.map(({ name }) => name)); // every version of a model is listed
  $("model").replaceChildren(...[...names].map((name) => new Option(name)));
  if (names.has(card?.name)) $("model").value = card.name;
  $("key-form").hidden = true;
  return chooseModel();
}

/** Takes the card of the model that is chosen. Resolves to whether it still is: cards may come out of order. */
async function chooseModel() {
  running?.abort();
  const name = $("model").value, isChosen = () => $("model").value === name;
  let taken;
  try {
    taken = await (await ask(`models/${encodeURIComponent(name)}`)).json();
  } catch (error) {
    if (!isChosen()) return false;
    if (card) $("model").value = card.name;
    throw error;
  }
  if (!isChosen()) return false;
  running?.abort();
  card = taken;
  forget();
  offerSettings(card);
  boxes.begin(card.classes);
  $("safe").checked &&= isSafePossible(card.classes);
  $("safe").disabled = !isSafePossible(card.classes);
  $("draws").hidden = !isFree(card);
  listMaps(mapsOf(request(), card));
  return true;
}

/** Offers these maps; the one that is shown stays, if it is among them. */
function listMaps(names) {
  const shown = names.includes($("map").value) ? $("map").value : "entropy";
  $("map").replaceChildren(...names.map((name) => new Option(titleOf(name), name)));
  $("map").value = shown;
}

/** Takes a file, or what a promise of one gives; where two are on their way, the later one. */
async function take(given, sampleName = "") {
  const mine = (taking = {}), file = await given;
  const taken = await createImageBitmap(file).catch(() => undefined);
  if (taking !== mine) return taken?.close();
  if (!taken) return say(`this browser cannot show ${file.name || "that file"}; choose a JPEG, PNG or WebP`, true);
  bitmap?.close();
  [picture, bitmap] = [file, taken];
  $("about-picture").textContent = `${file.name || "picture"}: ${bitmap.width} × ${bitmap.height} px, ${(file.size / 1e6).toFixed(2)} MB`;
  $("sample").value = sampleName;
  $("empty").hidden = true;
  document.body.classList.add("has-picture");
  forget();
  boxes.clear();
  view.begin();
  await segment();
}

/** The picture is another one, or the model: what was answered is of no use. */
function forget() {
  answer = undefined;
  $("run").disabled = !picture;
  legend.clear();
  for (const id of ["banner", "bar", "stale", "more"]) $(id).hidden = true;
  for (const id of ["timing", "hover"]) $(id).replaceChildren();
  endDraws();
  inspect();
  view.redraw();
}

async function segment() {
  if (!picture || !card) return;
  running?.abort();
  const mine = (running = new AbortController()), before = answer, asked = request(), started = performance.now();
  const clock = showWork(started);
  try {
    const { facts, fresh } = await answered(asked, mine.signal);
    mine.signal.throwIfAborted();
    Object.assign(fresh, { facts, ms: performance.now() - started });
    show(fresh);
  } catch (error) {
    if (running !== mine) return;
    if (answer !== before && before?.facts) show(before);
    if (error.name === "AbortError") return say(`Cancelled. ${whatIsShown()}`);
    $("job-row").hidden = !hasJob() && error.status !== 413 && error.status !== 504 && !error.message.startsWith("the deadline passed");
    refused(error.status === 404 ? await renewed(error) : error);
  } finally {
    clearInterval(clock);
    if (running === mine) showWork();
  }
}

/** Takes the models that are served by now, and says so in the error of a version that is not. */
function renewed(error) {
  return loadModels().then(() => new Error(`${error.message}. Press Segment to ask ${card.name} version ${card.version}`), () => error);
}

/** Shows that and for how long something is worked on, from `started` on, or that nothing is. */
function showWork(started) {
  $("cancel").hidden = started === undefined;
  if (started === undefined) return void ($("windows").hidden = true);
  if (($("job-row").hidden = !hasJob())) sayOfJob("");
  $("windows").removeAttribute("value");
  const tick = (live) => say(`Segmenting … ${((performance.now() - started) / 1000).toFixed(1)} s${$("windows").title}`, false, live);
  $("windows").title = "";
  tick("polite");
  return setInterval(tick, TICK_MS, "off");
}

/** The answer, whole or shown band by band: {facts, fresh}. */
async function answered(asked, signal) {
  const names = mapsOf(asked, card), fresh = { bands: [], asked, names, outputs: [...names, "probabilities"] };
  if (4 * bitmap.width * bitmap.height * card.classes.length <= EXACT_BYTES) {
    const { tensors, facts } = await infer(picture, asked, ["labels", ...fresh.outputs], signal);
    fresh.bands = [wholeBand(tensors)];
    return { facts, fresh };
  }
  fresh.outputs = fresh.names = names.filter((name) => ["entropy", "confidence", "mutual_information"].includes(name) || card.extra_maps.some((extra) => extra.name === name));
  const facts = await follow(picture, asked, { outputs: fresh.outputs, signal, progress, band: (one) => signal.aborted || addBand(fresh, one) });
  return { facts, fresh };
}

function progress({ windows_done: done, windows }) {
  Object.assign($("windows"), { hidden: false, max: windows, value: done, title: `, ${done} of ${windows} windows` });
}

function addBand(fresh, band) {
  fresh.bands = [...fresh.bands.filter(({ y0 }) => y0 !== band.y0), band];
  if (answer !== fresh) {
    forget();
    answer = fresh;
    listMaps(fresh.names);
    repaint();
  } else paintBands([band]);
}

function refused(error, tell = say, rest = whatIsShown()) {
  if (error.status === 401 || error.status === 403) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  tell(rest ? `${error.message}. ${rest}` : error.message, true);
}

function whatIsShown() {
  return !answer ? "" : answer.facts ? "The picture is of the last answer." : "The rows that were done are shown.";
}

/** Shows a whole answer, or none. */
function show(given) {
  if (!given) return forget();
  answer = given;
  listMaps(answer.names);
  say(outcome(answer.facts));
  showBanner(answer.facts);
  showTimes(answer.facts.phases, answer.ms);
  showCode(picture, answer.asked, hasKey());
  endDraws();
  $("more").hidden = false;
  const isLarge = bitmap.width * bitmap.height > LARGE_PIXELS;
  $("draws-run").disabled = isLarge;
  $("draws-about").textContent = isLarge ? "Only of pictures up to 2 megapixels." : "Four answers of one sample each, from this seed on, and where they disagree.";
  legend.show(answer, card.classes, colors());
  settingsChanged();
  repaint();
  inspect();
}

/** Paints everything anew: after another map, scale or palette. */
function repaint() {
  if (!answer) return view.redraw();
  answer.scale = scaleOf(answer, $("map").value, card, $("stretched").checked);
  showScale($("map").value, answer.scale, card);
  paintBands(answer.bands);
}

function paintBands(bands) {
  for (const band of bands) paintMap(band, { name: $("map").value, scale: answer.scale, isFading: $("fading").checked });
  repaintLabels(bands);
}

function repaintLabels(bands = answer?.bands) {
  if (!bands || !answer) return;
  const { low, high } = answer.scale, share = $("hide").value / $("hide").max;
  const hide = share < 1 ? { map: $("map").value, above: low + share * (high - low) } : undefined;
  const hidden = bands.reduce((sum, band) => sum + paintLabels(band, { colors: colors(), only: legend.only(), hide, size: size() }), 0);
  const total = bands.reduce((sum, { labels }) => sum + labels.length, 0);
  $("hidden").value = hide ? `${hide.above.toFixed(2)}: ${((100 * hidden) / total).toFixed(1)} % hidden` : "nothing hidden";
  view.redraw();
}

/** Draws one side of the view in pixels of the picture. */
function draw(pen, side, zoom = 1) {
  const shown = $(side).value;
  pen.drawImage(bitmap, 0, 0);
  pen.globalAlpha = $("opacity").value / 100;
  for (const band of (shown !== "photo" && answer?.bands) || []) {
    const layer = shown === "map" ? band.mapShown : band.labelsShown;
    if (layer) pen.drawImage(layer, 0, band.y0);
  }
  pen.globalAlpha = 1;
  if (card) boxes.draw(pen, zoom, colors());
}

function inspect() {
  showPixel(answer, view.pixel(), { classes: card?.classes, colors: card && colors() });
}

function settingsChanged() {
  if (!card) return;
  promise(card);
  $("stale").hidden = !answer?.facts || JSON.stringify(answer.asked) === JSON.stringify(request());
  view.redraw();
}

/** The parts of a figure of what is shown on the right. */
function figure() {
  const shown = $("right").value, occur = new Set(answer.bands.flatMap(({ labels }) => [...new Set(labels)]));
  const classes = card.classes.map(({ name }, k) => ({ name, color: colors()[k] })).filter((_, k) => shown === "labels" && occur.has(k));
  const { samples, seed } = answer.facts, caption = `${card.name} version ${card.version}, ${samples} samples, seed ${seed}`;
  return { size: size(), draw: (pen) => draw(pen, "right"), scale: shown === "map" && answer.scale, title: titleOf($("map").value), classes, caption };
}

/** Says how work on the answer goes, for as long as it is the one that is shown. */
function tell(work, title) {
  const shown = answer;
  say(`${title} …`);
  work.then(() => answer === shown && say(outcome(shown.facts)), (error) => answer === shown && error.name !== "AbortError" && refused(error));
}

async function sample(name) {
  return new File([await (await ask(`playground/${name}`)).blob()], name, { type: "image/jpeg" });
}

function listenForPictures() {
  $("file").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    target.value = ""; // so that the same file can be chosen again
    if (file) take(file);
  });
  $("sample").addEventListener("change", ({ target: { value } }) => value && take(sample(value), value).catch(refused));
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
}

function begin() {
  listenForPictures();
  const go = (isChosen) => isChosen && segment();
  $("model").addEventListener("change", () => chooseModel().then(go).catch(refused));
  $("samples").addEventListener("input", () => ($("samples-shown").value = $("samples").value));
  $("controls").addEventListener("input", settingsChanged);
  $("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    segment();
  });
  $("cancel").addEventListener("click", () => running?.abort());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepKey($("key").value);
    say("");
    loadModels().then(go).catch(refused);
  });
  for (const id of ["map", "fading", "stretched"]) $(id).addEventListener("change", repaint);
  for (const id of ["left", "right", "opacity"]) $(id).addEventListener("input", view.redraw);
  $("hide").addEventListener("input", () => repaintLabels());
  $("safe").addEventListener("change", () => {
    endDraws();
    repaintLabels();
    if (answer) legend.show(answer, card.classes, colors());
    inspect();
  });
  $("job").addEventListener("click", () => runJob({ picture, request: request(), say: sayOfJob }).catch((error) => refused(error, sayOfJob, "")));
  $("draws-run").addEventListener("click", () => tell(showDraws(picture, answer.asked, colors()), "Drawing samples"));
  offerDownloads(() => ({ picture, request: answer.asked, map: $("map").value, outputs: answer.outputs }), figure, tell);
  inspect();
  loadModels().then(go).catch(refused);
}

begin();
