// Runs behind directions.js in the scope of gr.HTML: `element` is its root, `server` calls the functions of play.py.
const find = (name) => element.querySelector(".far-" + name);
const canvas = find("canvas"), strip = find("strip"), pen = canvas.getContext("2d");
const CELL = 30; // pixels of a picture of the context
const WALKED = 120; // frames that a game goes on by itself when the page is opened, as nobody may be looking
const player = crypto.getRandomValues(new Uint32Array(4)).join("-");
const held = new Set(); // directions of keys and buttons that are down
let chosen = null; // of groups of actions, or of the numbers of a vector: what each is, until it is changed
let options = null, named = false, playing = false, waiting = false, start = 0, picked = null, alive = false;
const walker = new Walker();
let walked = null; // frames that the game went on by itself; null once anything was pressed
let pictures = new Map(); // frames that are in the context, for the strip
let arrivals = []; // times of the last frames, for the rate
const HUB = "https://huggingface.co", HUB_HEADERS_LAST = 20000; // milliseconds
let hubSaid = null, hubAsked = -Infinity;

function settings() {
  return {
    num_inference_steps: Number(find("steps").value),
    guidance_scale: Number(find("guidance").value),
    flex_rope_slope: Number(find("slope").value),
    long_memory: find("memory").checked,
  };
}

// Directions are held; other actions, too, by their number; groups and vectors stay as they are chosen.
function action() {
  if (chosen) return [...chosen];
  if (!named) return held.size ? Number([...held].at(-1)) : null;
  return directionOf(walked === null ? held : new Set([walker.next(canvas)]), options.actions);
}

function show(error) {
  find("error").textContent = error;
}

async function draw(reply) {
  const image = new Image();
  image.src = reply.image;
  await image.decode();
  canvas.width = image.width;
  canvas.height = image.height;
  pen.drawImage(image, 0, 0);
  pictures.set(reply.number, image);
  for (const [number, earlier] of reply.earlier ?? []) {
    pictures.set(number, new Image());
    pictures.get(number).src = earlier;
    await pictures.get(number).decode();
  }
  const looked = new Map(reply.attention ?? []);
  const kept = new Set([...reply.long, ...reply.short, reply.number, ...looked.keys()]);
  pictures = new Map([...pictures].filter(([number]) => kept.has(number)));
  drawStrip(reply.long, reply.short, looked);
  arrivals = [...arrivals, performance.now()].slice(-20);
  const rate = arrivals.length > 1 ? (1000 * (arrivals.length - 1)) / (arrivals.at(-1) - arrivals[0]) : 0;
  const model = reply.milliseconds ? (1000 / reply.milliseconds).toFixed(1) : "-";
  find("status").textContent =
    `frame ${reply.number}: model ${model} frames/s, end to end ${rate.toFixed(1)} frames/s\n` +
    `context: ${reply.long.length} long-term and ${reply.short.length} short-term frames, ` +
    `cache ${reply.megabytes.toFixed(1)} MB`;
  element.dataset.frame = reply.number;
}

// Long-term frames small, as the model sees them coarsely; those of the window large. Where attention is known, a
// frame is as bright as its share of it among the frames of its level.
function drawStrip(long, short, looked) {
  const brightest = [long, short].map((level) => Math.max(...level.map((number) => looked.get(number) ?? 0)));
  strip.dataset.looked = looked.size;
  const columns = Math.max(1, Math.floor(strip.parentElement.clientWidth / CELL));
  const context = [...long.map((number) => [number, "#e0a030", 4]), ...short.map((number) => [number, "#4a90d9", 1])];
  strip.width = columns * CELL;
  strip.height = Math.max(1, Math.ceil(context.length / columns)) * CELL;
  const stripPen = strip.getContext("2d");
  context.forEach(([number, color, margin], index) => {
    const left = (index % columns) * CELL, top = Math.floor(index / columns) * CELL;
    stripPen.fillStyle = color;
    stripPen.fillRect(left, top, CELL - 2, CELL - 2);
    const picture = pictures.get(number), size = CELL - 2 - 2 * margin;
    const most = brightest[index < long.length ? 0 : 1];
    stripPen.globalAlpha = most > 0 ? 0.1 + (0.9 * (looked.get(number) ?? 0)) / most : 1;
    if (picture) stripPen.drawImage(picture, left + margin, top + margin, size, size);
    stripPen.globalAlpha = 1;
  });
}

// A Space on ZeroGPU counts what is played against the visitor. Who that is, the Hub's page around this one says,
// in headers that Gradio asks it for in the same way before events of its own.
async function hubHeaders() {
  if (!options?.lent_gpu || window.parent === window || !window.supports_zerogpu_headers) return null;
  if (performance.now() > hubAsked + HUB_HEADERS_LAST) {
    hubAsked = performance.now();
    hubSaid = await new Promise((answer) => {
      const channel = new MessageChannel();
      channel.port1.onmessage = ({ data }) => answer(data ?? null);
      window.parent.postMessage("zerogpu-headers", HUB, [channel.port2]);
      setTimeout(answer, 3000, null);
    });
  }
  return hubSaid;
}

async function ask(name, argument) {
  waiting = true;
  try {
    const hub_headers = await hubHeaders();
    const reply = await server[name]({ player, ...(hub_headers && { hub_headers }), ...argument });
    show(reply.error ?? "");
    if (reply.error) pause();
    return reply.error ? null : reply;
  } catch (error) {
    pause();
    show("The server does not answer: " + error);
    return null;
  } finally {
    waiting = false;
  }
}

async function begin() {
  while (waiting) await new Promise((done) => setTimeout(done, 20));
  pictures.clear();
  arrivals = [];
  const seed = Math.min(Math.max(0, Math.floor(Number(find("seed").value) || 0)), Number.MAX_SAFE_INTEGER);
  const reply = await ask("start", { start, image: picked, seed, settings: settings() });
  alive = reply !== null;
  if (reply) await draw(reply);
}

async function reset() {
  pause();
  await begin();
}

async function step() {
  if (waiting || !options) return;
  if (!alive) await begin();
  if (!alive) return;
  const reply = await ask("step", { action: action(), settings: settings(), look: find("look").checked });
  if (reply) await draw(reply);
}

function pause() {
  playing = false;
  walked = null;
  arrivals = [];
  find("run").textContent = "Play";
}

async function run() {
  if (playing) return;
  playing = true;
  find("run").textContent = "Pause";
  while (playing && element.isConnected) {
    await step();
    await new Promise(requestAnimationFrame);
    if (walked !== null && ++walked === WALKED) pause();
  }
}

function choose(value, button) {
  start = value;
  element.querySelectorAll(".far-starts button").forEach((other) => other.classList.toggle("chosen", other === button));
}

function press(name, down) {
  if (down) walked = null;
  down ? held.add(name) : held.delete(name);
  element.querySelectorAll(".far-pad button").forEach((button) => {
    button.classList.toggle("held", keysOf(button.dataset.action).every((part) => held.has(part)));
  });
}

function release() {
  [...held].forEach((name) => press(name, false));
}

// What is held for an action: a number, or directions.
function keysOf(action) {
  return named ? action.split("-") : [action];
}

// The part of an action that a key stands for, if any.
function keyOf(event) {
  const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
  if (named || !options) return KEYS[event.code];
  return digit && Number(digit) < options.num_actions ? digit : undefined;
}

// A row of buttons for each group of actions, of which one is chosen, at first the one of number 0.
function buildGroups() {
  chosen = options.groups.map(() => 0);
  options.groups.forEach((group, index) => {
    const row = document.createElement("div");
    row.className = "far-group";
    row.append(group.name);
    group.actions.forEach((name, value) => {
      const button = document.createElement("button");
      button.textContent = name;
      button.classList.toggle("held", value === 0);
      button.onclick = () => {
        chosen[index] = value;
        row.querySelectorAll("button").forEach((other) => other.classList.toggle("held", other === button));
        run();
      };
      row.append(button);
    });
    find("pad").append(row);
  });
}

// A slider for each number of a vector.
function buildNumbers() {
  chosen = options.numbers.map((number) => number.value);
  options.numbers.forEach((number, index) => {
    const label = document.createElement("label"), slider = document.createElement("input");
    const output = document.createElement("output");
    label.className = "far-group";
    Object.assign(slider, { type: "range", min: number.least, max: number.most, step: "any", value: number.value });
    const tell = () => (output.textContent = Number(chosen[index].toPrecision(3)));
    slider.oninput = () => {
      chosen[index] = Number(slider.value);
      tell();
      run();
    };
    tell();
    label.append(number.name, slider, output);
    find("pad").append(label);
  });
}

function build() {
  options.starts.forEach((image, index) => {
    const button = document.createElement("button");
    button.innerHTML = `<img src="${image}" alt="Start ${index + 1}">`;
    button.onclick = () => { picked = null; choose(index, button); reset(); };
    find("starts").append(button);
  });
  const nothing = document.createElement("button");
  nothing.className = "nothing";
  nothing.textContent = "From nothing";
  nothing.onclick = () => { picked = null; choose(null, nothing); reset(); };
  find("starts").append(nothing);
  const first = find("starts").querySelector("button");
  choose(options.starts.length ? 0 : null, first);
  named = options.actions !== null && options.actions.every((name) => name in ARROWS);
  if (!named) release(); // what was pressed before this was known
  const buttons = named ? Object.keys(ARROWS).filter((name) => options.actions.includes(name))
    : [...Array(options.num_actions ?? 0).keys()].map(String);
  for (const name of buttons) {
    const button = document.createElement("button");
    button.dataset.action = name;
    button.textContent = named ? ARROWS[name] : options.actions?.[Number(name)] ?? name;
    button.title = named ? name : "action " + name;
    const set = (down) => (event) => { event.preventDefault(); keysOf(name).forEach((part) => press(part, down)); };
    button.onpointerdown = (event) => { set(true)(event); run(); };
    for (const end of ["pointerup", "pointerleave", "pointercancel"]) button.addEventListener(end, set(false));
    find("pad").append(button);
  }
  if (options.groups) buildGroups();
  if (options.numbers) buildNumbers();
  find("keys").textContent = chosen ? "What you choose above stays until you change it."
    : named ? "Keys: arrow keys, WASD, or the buttons." + (options.lent_gpu ? "" : " Until you press one, it walks by itself.")
    : buttons.length ? `Keys 0 to ${Math.min(9, buttons.length - 1)}, or the buttons under the picture.` : "";
  find("guidance").closest(".far-setting").hidden = !options.guidance;
  find("memory").closest(".far-setting").hidden = !options.long;
  find("steps").value = options.num_inference_steps;
  find("steps").max = Math.max(32, options.num_inference_steps);
  find("guidance").value = 1;
  find("slope").value = options.flex_rope_slope;
  element.querySelectorAll("input[type=range]").forEach((slider) => {
    const tell = () => (slider.parentElement.querySelector("output").textContent = slider.value);
    slider.addEventListener("input", tell);
    slider.addEventListener("pointerup", () => slider.blur()); // arrow keys are the game's again
    tell();
  });
}

// Keys count wherever the focus is, as soon as this runs, save in fields that need them.
document.addEventListener("keydown", (event) => {
  const isShown = element.isConnected && canvas.offsetParent !== null;
  const isTyping = event.target.matches?.("input:not([type=checkbox], [type=file]), textarea, select");
  if (!isShown || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const name = keyOf(event);
  if (!name) return;
  event.preventDefault();
  if (event.repeat) return;
  press(name, true);
  run();
});
document.addEventListener("keyup", (event) => {
  const name = keyOf(event);
  if (name) press(name, false);
});
// Nobody says so when a key is let go in another window.
window.addEventListener("blur", release);
canvas.addEventListener("blur", release);
document.addEventListener("visibilitychange", () => { if (document.hidden) release(); });
find("run").onclick = () => { if (playing) pause(); else { canvas.focus(); run(); } };
find("step").onclick = () => { pause(); step(); };
find("reset").onclick = reset;
// A data URL of the file; of a large picture, such as a phone's photo, a smaller copy.
async function dataUrl(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);
  if (bitmap && (file.size > options.max_image_bytes || bitmap.width * bitmap.height > options.max_image_pixels)) {
    const scale = Math.min(1, 1024 / Math.max(bitmap.width, bitmap.height));
    const small = document.createElement("canvas");
    small.width = Math.max(1, Math.round(scale * bitmap.width));
    small.height = Math.max(1, Math.round(scale * bitmap.height));
    const smallPen = small.getContext("2d");
    smallPen.imageSmoothingQuality = "high";
    smallPen.drawImage(bitmap, 0, 0, small.width, small.height);
    return small.toDataURL("image/jpeg", 0.95);
  }
  if (file.size > options.max_image_bytes) return null;
  return new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  });
}
find("upload").onchange = async (event) => {
  const file = event.target.files[0];
  event.target.value = "";
  if (!file) return;
  const url = await dataUrl(file);
  if (!url) {
    const limit = options.max_image_bytes / 2 ** 20;
    return show(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB; at most ${limit} MB`);
  }
  picked = url;
  choose(null, null);
  await reset();
};
find("save").onclick = async () => {
  while (waiting) await new Promise((done) => setTimeout(done, 20));
  const reply = await ask("save", {});
  if (!reply) return;
  const link = document.createElement("a");
  link.href = reply.video;
  link.download = "far-play.mp4";
  link.click();
};
window.addEventListener("pagehide", (event) => {
  if (event.persisted) return; // the page may come back
  playing = false;
  server.leave({ player });
});
(async () => {
  options = await server.options({ player });
  build();
  await begin();
  element.dataset.ready = "yes";
  // A GPU that is lent counts against the visitor, who has not asked for it yet.
  if (!alive || playing || options.lent_gpu || new URLSearchParams(location.search).has("paused")) return;
  walked = 0;
  run();
})();
