// What can be taken along: files of the server for this very request, a figure of what is shown, and the request as code.

import { ticksOf } from "./answer.js";
import { $, make } from "./elements.js";
import { queryOf, segmentAs } from "./protocol.js";
import { STOPS } from "./ramp.js";

const FIGURE_PX = 1600, MARGIN = 16, LINE = 22;
const FILES = [
  ["Labels (PNG)", "image/png", "labels.png", () => ({})],
  ["Map (PNG, 16 bits)", "image/png", "map.png", ({ map }) => ({ picture: map })],
  ["Regions (GeoJSON)", "application/geo+json", "regions.geojson", () => ({})],
  ["Table (JSON)", "application/json", "answer.json", () => ({})],
  ["Everything (npz)", "application/x-npz", "answer.npz", ({ outputs }) => ({ outputs })],
];

/** page(): {picture, request, map, outputs}. figure(): the figure's parts. tell(promise): shows how it goes. */
export function offerDownloads(page, figure, tell) {
  const files = FILES.map(([title, media, name, extra]) => button(title, async () => {
    const { picture, request, ...shown } = page();
    save(await (await segmentAs(media, picture, request, extra(shown))).blob(), name);
  }, tell));
  const figures = ["svg", "png"].map((kind) => button(`Figure (${kind.toUpperCase()})`, async () => {
    const drawn = drawFigure(figure());
    save(kind === "svg" ? new Blob([drawn.text], { type: "image/svg+xml" }) : await rasterised(drawn), `figure.${kind}`);
  }, tell));
  $("downloads").querySelector("div").replaceChildren(...files, ...figures);
}

function button(title, act, tell) {
  const made = make("button", { type: "button" }, title);
  made.addEventListener("click", () => tell(act(), title));
  return made;
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60e3);
}

/** {text, width, height} of an SVG. size: of the picture. draw(pen): its pixels. scale, title: of the bar, if a map is
    shown. classes: [{name, color}] that occur. caption: who answered. */
function drawFigure({ size, draw, scale, title, classes, caption }) {
  const shrink = Math.min(1, FIGURE_PX / Math.max(...size)), [width, height] = size.map((px) => Math.max(1, Math.round(px * shrink)));
  const canvas = make("canvas", { width, height }), pen = canvas.getContext("2d");
  pen.scale(shrink, shrink);
  draw(pen);
  const full = Math.max(width, 360), rows = Math.ceil(classes.length / Math.max(1, Math.floor(full / 160))), perRow = Math.ceil(classes.length / Math.max(1, rows));
  const parts = [`<image x="${MARGIN}" y="${MARGIN}" width="${width}" height="${height}" href="${canvas.toDataURL("image/png")}"/>`];
  let y = height + 2 * MARGIN;
  classes.forEach(({ name, color }, k) => {
    const [x, top] = [MARGIN + (k % perRow) * 160, y + Math.floor(k / perRow) * LINE];
    parts.push(`<rect x="${x}" y="${top}" width="14" height="14" fill="rgb(${color})" stroke="#888"/>`, text(x + 20, top + 12, name));
  });
  y += rows * LINE;
  if (scale) {
    const stops = STOPS.map((tone, i) => `<stop offset="${i / (STOPS.length - 1)}" stop-color="${tone}"/>`).join("");
    parts.push(`<defs><linearGradient id="ramp">${stops}</linearGradient></defs>`, text(MARGIN, y + 12, title));
    parts.push(`<rect x="${MARGIN}" y="${y + 18}" width="${full}" height="12" fill="url(#ramp)"/>`);
    for (const [share, label] of ticksOf(scale)) parts.push(text(MARGIN + share * full, y + 46, label, ["start", "middle", "end"][Math.ceil(2 * share - 1e-9 - (share < 1 && share > 0.5))]));
    y += 3 * LINE;
  }
  parts.push(text(MARGIN, y + 12, caption));
  const [w, h] = [full + 2 * MARGIN, y + LINE];
  return { text: `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>${parts.join("")}</svg>`, width: w, height: h };
}

function text(x, y, words, anchor = "start") {
  const safe = words.replace(/[&<>]/g, (letter) => `&#${letter.charCodeAt(0)};`);
  return `<text x="${x}" y="${y}" text-anchor="${anchor}">${safe}</text>`;
}

async function rasterised({ text: svg, width, height }) {
  const image = new Image(), canvas = make("canvas", { width, height });
  image.src = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  await image.decode();
  canvas.getContext("2d").drawImage(image, 0, 0);
  URL.revokeObjectURL(image.src);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** Writes the request as a curl command and as Python. */
export function showCode(picture, request, hasKey) {
  const name = (picture.name || "picture").replace(/[^\w.-]/g, "_"), media = picture.type || "application/octet-stream";
  const url = `${new URL("segment", location.href)}?${queryOf(request)}`;
  $("curl").textContent = [
    `curl --data-binary @${name} '${url.replaceAll("'", "%27")}'`, `-H 'Content-Type: ${media}'`, ...(hasKey ? [`-H "Authorization: Bearer $KEY"`] : []),
    "-H 'Accept: application/json'",
  ].join(" \\\n  ");
  const headers = `{"Content-Type": "${media}", "Accept": "application/x-npz"${hasKey ? ', "Authorization": f"Bearer {key}"' : ""}}`;
  $("python").textContent = `import io

import httpx
import numpy as np

with open("${name}", "rb") as picture:
    answer = httpx.post(
        "${url}",
        content=picture.read(), timeout=300,
        headers=${headers},
    ).raise_for_status()
maps = np.load(io.BytesIO(answer.content))
print(maps["labels"].shape, {name: float(maps[name].mean()) for name in maps if name != "labels"})
`;
}
