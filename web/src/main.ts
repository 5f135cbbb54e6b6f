// The page: asks the worker for a frame as soon as the last one came.

import { Controls } from "./controls";
import type { Config } from "./exported_rollout";
import { loadFile } from "./files";
import { readPicture, readStrip, readVideo, videoOf } from "./media";
import type { Beginning, Frame, Loaded } from "./worker";

const REWIND = 8; // frames
const MOST_RATE = 20; // frames a second; a fast GPU would make a walk a race
const CELL = 30; // pixels of a picture of the strip
const KEPT_BYTES = 1e8; // of pictures, for the video to save
const HELP = "To play another model, add ?model= and the address of a folder that `diffusers-far export` wrote.";

const find = <T extends HTMLElement>(selector: string) => document.querySelector<T>(selector)!;
const button = (id: string) => find<HTMLButtonElement>("#" + id);
const screen = find<HTMLCanvasElement>("#screen"), strip = find<HTMLCanvasElement>("#strip");
const quality = find<HTMLInputElement>("#quality");
const options = new URLSearchParams(location.search);

let controls: Controls, config: Config, loaded: Loaded;
let seed = Number(options.get("seed")) || 0, chosen = options.get("start") ?? "0", given: ImageData[] = [];
let playing = true, numFrames = 0, wake = () => {};
let pictures = new Map<number, ImageBitmap>(), marked: typeof pictures | null = null;
let arrivals: number[] = []; // times of the last frames, for the rate
const jobs: (() => Promise<void>)[] = []; // what was asked for, before the next frame

// The worker, and one question at a time.
const worker = new Worker("worker.js", { type: "module" });
const answers: { done: (result: any) => void; failed: (error: Error) => void }[] = [];
function ask<T>(name: string, argument?: unknown): Promise<T> {
  worker.postMessage({ id: 0, name, argument });
  return new Promise((done, failed) => answers.push({ done, failed }));
}
worker.onmessage = ({ data }) => {
  if (data.progress) return showProgress(data.progress.loaded, data.progress.total);
  const { done, failed } = answers.shift()!;
  data.error === undefined ? done(data.result) : failed(new Error(data.error));
};
worker.onerror = (event) => fail(new Error(`The worker failed: ${event.message || "it cannot be loaded"}`));

function showProgress(bytes: number, total: number): void {
  const megabytes = (count: number) => (count / 1e6).toFixed(1);
  Object.assign(find<HTMLProgressElement>("progress"), { value: bytes, max: total });
  find("#loading span").textContent = `Loading ${megabytes(bytes)} of ${megabytes(total)} MB`;
  find("#cost").textContent = `Costs: ${Math.ceil(total / 1e6)} MB to load once, then it plays offline; one busy processor or GPU. ` +
    "Nothing that you do or open leaves this device.";
}

function fail(error: unknown): void {
  setPlaying(false);
  find("#loading").hidden = true;
  find("#error").textContent = error instanceof Error ? error.message : String(error);
}

function setPlaying(value: boolean): void {
  playing = value;
  arrivals = [];
  button("run").textContent = value ? "Pause" : "Play";
  wake();
}

function queue(job: () => Promise<void>): void {
  jobs.push(job);
  wake();
}

async function keep(number: number, picture: ImageBitmap): Promise<void> {
  pictures.set(number, picture);
  const most = Math.floor(KEPT_BYTES / (4 * picture.width * picture.height));
  if (pictures.size > most) pictures.delete(pictures.keys().next().value!);
}

function show(number: number): void {
  const picture = pictures.get(number);
  if (!picture) return;
  Object.assign(screen, { width: picture.width, height: picture.height });
  screen.getContext("2d")!.drawImage(picture, 0, 0);
}

// Long-term frames small, as the model sees them coarsely; those that it sees in full large.
function drawStrip(long: number[], short: number[]): void {
  const columns = Math.max(1, Math.floor(find("#side").clientWidth / CELL));
  const cells = [...long.map((one) => [one, 4]), ...short.map((one) => [one, 1])];
  Object.assign(strip, { width: columns * CELL, height: Math.max(1, Math.ceil(cells.length / columns)) * CELL });
  const pen = strip.getContext("2d")!;
  cells.forEach(([number, margin], i) => {
    const left = (i % columns) * CELL, top = Math.floor(i / columns) * CELL, size = CELL - 2 - 2 * margin;
    pen.fillStyle = i < long.length ? "#e0a030" : "#4a90d9";
    pen.fillRect(left, top, CELL - 2, CELL - 2);
    const picture = pictures.get(number);
    if (picture) pen.drawImage(picture, left + margin, top + margin, size, size);
  });
  strip.setAttribute("aria-label", `Pictures that the model remembers: ${short.length} in full, ${long.length} coarsely`);
}

/** Frames that the last call saw coarsely, and in full. */
function seen({ calls, number }: Frame): [long: number[], short: number[]] {
  const { ring_ages, window_ages } = calls[calls.length - 1];
  const frames = (ages: number[]) => ages.filter((age) => age > 0).map((age) => number - age).sort((a, b) => a - b);
  return config.window_frames ? [frames(ring_ages), frames(window_ages)] : [[], frames(ring_ages)];
}

const numSteps = () => Number(Object.keys(config.samplers)[Number(quality.value)]);

async function begin(): Promise<void> {
  const start = config.starts[Number(chosen)], first = given.length;
  const beginning: Beginning = first ? { pictures: given.map((one) => one.data) } : start ? { start: Number(chosen) } : null;
  const label = find<HTMLInputElement>("#class input").value, classLabel = config.num_classes ? Number(label) : null;
  numFrames = await ask<number>("begin", { beginning, settings: { seed, classLabel } });
  const shown = start && !first ? await startPictures(Number(chosen)) : await Promise.all(given.map((one) => createImageBitmap(one)));
  pictures = new Map(shown.map((picture, i) => [i, picture]));
  forget();
  show(numFrames - 1);
  drawStrip([], [...pictures.keys()]);
  document.body.dataset.frame = String(numFrames - 1);
}

function forget(): void {
  marked = null;
  button("back").disabled = true;
}

async function startPictures(index: number): Promise<ImageBitmap[]> {
  const { picture, num_frames } = config.starts[index];
  const data = await loadFile(loaded.folder + picture, config.files[picture], () => undefined);
  return readStrip(data, num_frames, config.frame_size);
}

async function step(): Promise<void> {
  const frame = await ask<Frame>("step", { action: controls.action(screen), numSteps: numSteps() });
  const [height, width] = config.frame_size;
  await keep(frame.number, await createImageBitmap(new ImageData(frame.picture as ImageDataArray, width, height)));
  numFrames = frame.number + 1;
  show(frame.number);
  drawStrip(...seen(frame));
  find("#loading").hidden = true;
  arrivals = [...arrivals, performance.now()].slice(-20);
  const rate = (1000 * (arrivals.length - 1)) / (arrivals[arrivals.length - 1] - arrivals[0]) || 0;
  const place = frame.backend === "webgpu" ? "on your GPU" : "on your CPU";
  find("#status").textContent = `Frame ${frame.number} · ${rate.toFixed(1)} frames/s · ${place}`;
  find("#status").title = frame.note || `threads: ${loaded.threads}`;
  document.body.dataset.frame = String(frame.number);
  const wait = 1000 / MOST_RATE - frame.milliseconds;
  if (wait > 0) await new Promise((done) => setTimeout(done, wait));
}

/** One thing after another, for ever. */
async function run(): Promise<void> {
  for (;;) {
    try {
      if (jobs.length) await jobs.shift()!();
      else if (playing && !document.hidden) await step();
      else await new Promise<void>((done) => (wake = done));
    } catch (error) {
      fail(error);
    }
  }
}

/** Begin anew, from the number of a start, own pictures, or nothing. */
function restart(start: string, frames: ImageData[] = []): void {
  chosen = start;
  given = frames;
  for (const one of document.querySelectorAll<HTMLElement>("#starts button"))
    one.classList.toggle("chosen", one.dataset.start === start);
  find("#error").textContent = "";
  queue(begin);
  setPlaying(true);
}

function addStart(start: string, label: string): HTMLButtonElement {
  const one = document.createElement("button");
  one.dataset.start = start;
  one.setAttribute("aria-label", label);
  one.onclick = () => restart(start);
  find("#starts").append(one);
  return one;
}

async function build(): Promise<void> {
  controls = new Controls(config.actions, find("#pad"), () => playing || setPlaying(true));
  find("#keys").textContent = "Keys: " + controls.hint;
  find("#class").hidden = !config.num_classes;
  find<HTMLInputElement>("#class input").max = String((config.num_classes ?? 1) - 1);
  find("#class").onchange = () => restart(chosen, given);
  const numbers = Object.keys(config.samplers), wanted = options.get("quality") ?? "";
  quality.max = String(numbers.length - 1);
  quality.value = String(numbers.indexOf(wanted in config.samplers ? wanted : String(config.num_inference_steps)));
  const tell = () => {
    find("h2 output").textContent = numSteps() === 1 ? "1 step" : `${numSteps()} steps`;
    quality.setAttribute("aria-valuetext", `${numSteps()} steps`);
  };
  quality.oninput = tell;
  quality.onpointerup = () => quality.blur(); // arrow keys are the game's again
  tell();
  addStart("nothing", "From nothing").textContent = "From nothing";
  for (const index of config.starts.keys()) {
    const one = addStart(String(index), `Real picture ${index + 1}`), canvas = document.createElement("canvas");
    one.append(canvas);
    startPictures(index).then((all) => {
      const last = all[all.length - 1];
      Object.assign(canvas, { width: last.width, height: last.height });
      canvas.getContext("2d")!.drawImage(last, 0, 0);
    }).catch(fail);
  }
}

button("run").onclick = () => setPlaying(!playing);
button("rewind").onclick = () => queue(async () => {
  numFrames = await ask<number>("rewind", Math.min(REWIND, Math.max(0, numFrames - 1)));
  pictures = new Map([...pictures].filter(([number]) => number < numFrames));
  returned();
});
button("mark").onclick = () => queue(async () => {
  await ask("mark");
  marked = new Map(pictures);
  button("back").disabled = false;
});
button("back").onclick = () => queue(async () => {
  numFrames = await ask<number>("back");
  pictures = new Map(marked!);
  returned();
});
button("again").onclick = () => {
  seed = crypto.getRandomValues(new Uint32Array(1))[0];
  restart(chosen, given);
};
button("save").onclick = () => queue(async () => {
  if (!pictures.size) return;
  const [video, ending] = await videoOf([...pictures.values()]), link = document.createElement("a");
  link.href = URL.createObjectURL(video);
  link.download = `far-game${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
});
button("share").onclick = async () => {
  const url = new URL(location.href);
  for (const [name, value] of Object.entries({ seed, start: chosen, quality: numSteps() })) url.searchParams.set(name, String(value));
  history.replaceState(null, "", url);
  const isCopied = await navigator.clipboard?.writeText(url.href).then(() => true, () => false);
  const own = given.length ? " It begins from nothing: pictures of yours stay on this device." : "";
  find("#status").textContent = (isCopied ? "The link is copied." : `The link is in the address bar.`) + own;
};
for (const [id, read] of [["picture", readPicture], ["video", readVideo]] as const)
  find<HTMLInputElement>("#" + id).onchange = async (event) => {
    const field = event.target as HTMLInputElement, file = field.files?.[0];
    if (file && config) await read(file, config.frame_size).then((frames) => restart("nothing", frames), fail);
    field.value = "";
  };
document.addEventListener("visibilitychange", () => wake());

function returned(): void {
  setPlaying(false); // a key goes on, another way
  show(numFrames - 1);
  document.body.dataset.frame = String(numFrames - 1);
}

/** The page's files stay in the browser. Where the server's headers do not allow threads, the service worker's do. */
async function registerWorker(): Promise<void> {
  if (!navigator.serviceWorker) return;
  await navigator.serviceWorker.register("service_worker.js");
  if (self.crossOriginIsolated || sessionStorage.getItem("reloaded")) return;
  await navigator.serviceWorker.ready;
  sessionStorage.setItem("reloaded", "yes");
  location.reload();
}

async function main(): Promise<void> {
  registerWorker().catch(() => undefined); // it plays without
  const wanted = (options.get("model") ?? "model").replace(/\/?(rollout\.json)?$/, "/");
  try {
    loaded = await ask<Loaded>("load", { folder: new URL(wanted, location.href).href, backend: options.get("backend") });
  } catch (error) {
    return fail(new Error(`${(error as Error).message} ${HELP}`));
  }
  config = loaded.config;
  await build();
  restart(chosen in config.starts ? chosen : config.starts.length && chosen !== "nothing" ? "0" : "nothing");
  await run();
}

main().catch(fail);
