// What is asked for: the model's own settings, read into one request.

import { $, make } from "./elements.js";

/** Shows the settings that a model has, at its own values. */
export function offerSettings(card) {
  const { sampling, prompt, calibration, window } = card;
  const { width, height } = window, turns = height === width ? ["none", "flip", "d4", "scales"] : ["none", "flip", "scales"];
  $("about").textContent = `${card.method}, version ${card.version}: ${aboutSamples(sampling)}; windows of ${width} × ${height} px, ${card.classes.length} classes`;
  $("samples-row").hidden = $("seed-row").hidden = !isFree(card);
  $("samples").max = Math.max(32, sampling.default_samples);
  $("samples").value = $("samples-shown").value = sampling.default_samples;
  $("views").replaceChildren(...turns.map((name) => new Option(name)));
  $("views").value = card.views;
  for (const [id, risks] of [["risk", calibration?.risks ?? []], ["class-risk", calibration?.class_risks ?? []]]) {
    $(`${id}-row`).hidden = !risks.length;
    $(id).replaceChildren(new Option("not bounded", ""), ...risks.map((risk) => new Option(`${100 * risk} %`, risk)));
  }
  $("boxes-row").hidden = prompt.kind !== "boxes";
  $("tags-row").hidden = prompt.kind !== "tags";
  $("tags").replaceChildren(...card.classes.map(({ name }) => make("label", {}, make("input", { type: "checkbox", value: name }), ` ${name}`)));
  promise(card);
}

/** Whether samples are drawn, as many as one likes. */
export const isFree = ({ sampling }) => ["latent", "dropout"].includes(sampling.kind);

function aboutSamples({ kind, members }) {
  if (members.length > 1) return `samples are ${members.join(", ")}`;
  return { latent: "each sample draws a latent", dropout: "each sample drops other channels" }[kind] ?? "one pass, no samples";
}

/** Says what the chosen risks promise. */
export function promise({ calibration }) {
  const [risk, classRisk] = [$("risk").value, $("class-risk").value], parts = [];
  if (risk) parts.push(`at most ${100 * risk} % of a picture's pixels carry a wrong label`);
  if (classRisk) parts.push(`of what is called a class at most ${100 * classRisk} % is wrong, for every class`);
  $("promise").hidden = !parts.length;
  if (parts.length) $("promise").textContent = `Promised: ${parts.join(", and ")}, on average over pictures like the ${calibration.num_frames} it was calibrated on, not of every picture. The most uncertain pixels are withheld for it.`;
  $("promise").title = parts.length ? calibration.data : "";
}

/** {model, version, options, prompt}, as it is set. boxes: rows. */
export function readRequest(card, boxes) {
  const options = { seed: isFree(card) ? Number($("seed").value) : 0, views: $("views").value };
  if (isFree(card)) options.samples = Number($("samples").value);
  for (const [id, name] of [["risk", "max_risk"], ["class-risk", "max_class_risk"]]) if ($(id).value) options[name] = Number($(id).value);
  if ($("scale-to").value.trim()) options.scale = $("scale-to").value.trim();
  const tags = [...$("tags").querySelectorAll(":checked")].map((box) => box.value);
  const prompt = card.prompt.kind === "tags" && tags.length ? { tags } : card.prompt.kind === "boxes" && boxes.length ? { boxes } : {};
  return { model: card.name, version: card.version, options, prompt };
}

/** The maps that an answer to a request has. */
export function mapsOf({ options, prompt }, card) {
  const members = Object.keys(prompt).length ? card.prompt.members.length : 0;
  const isOne = (options.samples ?? (members || card.sampling.default_samples)) === 1 && options.views === "none";
  const [absent, present] = isOne ? ["mutual_information", "seam"] : ["seam", "mutual_information"];
  return (card.maps.single ?? card.maps.several).map((name) => (name === absent ? present : name));
}
