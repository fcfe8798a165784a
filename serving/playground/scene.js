// A street drawn on the spot, so that the page has something to show without a photograph of anyone's.

const WIDTH = 480, HEIGHT = 360, HORIZON = 170;

/** A JPEG of the scene. */
export function drawScene() {
  const canvas = Object.assign(document.createElement("canvas"), { width: WIDTH, height: HEIGHT });
  const pen = canvas.getContext("2d");
  const fill = (color, ...corners) => {
    pen.fillStyle = color;
    pen.beginPath();
    corners.forEach(([x, y]) => pen.lineTo(x, y));
    pen.fill();
  };
  const box = (color, x, y, width, height) => { pen.fillStyle = color; pen.fillRect(x, y, width, height); };
  const disc = (color, x, y, radius) => { pen.fillStyle = color; pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.fill(); };

  const sky = pen.createLinearGradient(0, 0, 0, HORIZON);
  sky.addColorStop(0, "#b9c4d2");
  sky.addColorStop(1, "#e9ecef");
  box(sky, 0, 0, WIDTH, HORIZON + 10);
  fill("#8a7666", [0, 20], [120, 75], [120, 190], [0, 225]);
  fill("#6d625b", [480, 0], [345, 80], [345, 190], [480, 235]);
  box("#a39384", 120, 100, 70, 85);
  for (let floor = 0; floor < 4; floor++)
    for (let pane = 0; pane < 4; pane++) {
      box("#3c4046", 8 + 28 * pane, 62 + 30 * floor + 5 * pane, 13, 17 - pane);
      box("#35383d", 365 + 29 * pane, 75 + 32 * floor - 6 * pane, 14, 18 + pane);
    }
  [[215, 140, 26], [240, 150, 22], [300, 138, 28], [322, 152, 20], [270, 155, 16]].forEach(([x, y, r]) => disc("#3f5232", x, y, r));
  box("#4a3b2e", 298, 160, 5, 25);
  fill("#5d5d60", [200, 180], [300, 180], [480, 330], [480, 360], [0, 360], [0, 330]);
  fill("#8d8780", [200, 180], [120, 185], [0, 222], [0, 330]);
  fill("#8d8780", [300, 180], [345, 185], [480, 232], [480, 330]);
  for (let dash = 0; dash < 6; dash++) fill("#d6d6d2", [248, 195 + dash * dash * 5], [252, 195 + dash * dash * 5],
    [254 + dash, 201 + dash * dash * 6], [246 - dash, 201 + dash * dash * 6]);
  box("#1d2330", 305, 190, 74, 34);
  box("#232b3b", 317, 172, 48, 22);
  box("#7d8ea3", 321, 176, 40, 14);
  [319, 365].forEach((x) => disc("#0d0e10", x, 224, 9));
  box("#4b4d50", 160, 60, 4, 150);
  box("#2a2c3a", 84, 205, 15, 34);
  disc("#b98b6e", 91, 198, 7);
  box("#191a20", 84, 238, 6, 28);
  box("#191a20", 93, 238, 6, 28);
  const pixels = pen.getImageData(0, 0, WIDTH, HEIGHT);
  for (let i = 0, state = 1; i < pixels.data.length; i++) {
    state = (state * 48271) % 2147483647; // grain: a flat surface is nothing that a camera sees
    if (i % 4 < 3) pixels.data[i] += (state % 19) - 9;
  }
  pen.putImageData(pixels, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
}
