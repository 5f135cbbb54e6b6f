// The worker: has the graphs and the running video, and answers the page. A message is {id, name, argument}.

import type { Action, Config, Settings, Start } from "./exported_rollout";
import { ExportedRollout } from "./exported_rollout";
import type { Call } from "./frame_plan";
import type { Backend } from "./graphs";
import { Graphs } from "./graphs";
import { seededNoise } from "./noise";

/** Where a game begins: with a start of the export, with pictures [H, W, RGBA] of the model's size, or with nothing. */
export type Beginning = { start: number } | { pictures: Uint8ClampedArray[] } | null;
export interface Loaded { config: Config; folder: string; backend: Backend; threads: number }
export interface Frame {
  number: number;
  picture: Uint8ClampedArray; // [H, W, RGBA]
  calls: Call[]; // that made it
  milliseconds: number;
  backend: Backend;
  note: string;
}

let graphs: Graphs, game: ExportedRollout, branch: ExportedRollout | null = null;

async function load({ folder, backend }: { folder: string; backend: Backend | null }): Promise<Loaded> {
  graphs = await Graphs.load(folder, backend, (loaded, total) => postMessage({ progress: { loaded, total } }));
  return { config: graphs.config, folder, backend: graphs.backend, threads: graphs.threads };
}

async function begin({ beginning, settings }: { beginning: Beginning; settings: Settings }): Promise<number> {
  const fresh = new ExportedRollout(graphs.config, (name, inputs) => graphs.run(name, inputs), settings);
  if (beginning && "start" in beginning) await appendStart(fresh, graphs.config.starts[beginning.start]);
  else for (const picture of beginning?.pictures ?? []) await fresh.append(planes(picture));
  game = fresh;
  branch = null;
  return game.numFrames;
}

async function appendStart(rollout: ExportedRollout, start: Start): Promise<void> {
  const bytes = await graphs.file(start.latents), bits = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
  const count = bits.length / start.num_frames;
  for (let i = 0; i < start.num_frames; i++) {
    const latents = Float32Array.from(bits.subarray(i * count, (i + 1) * count), fromHalf);
    rollout.appendLatents(latents, start.actions?.[i] ?? null);
  }
}

async function step({ action, numSteps }: { action: Action; numSteps: number }): Promise<Frame> {
  const began = performance.now();
  await game.step(action, numSteps);
  const number = game.numFrames - 1;
  const picture = rgba(await game.decode(number), graphs.config.frame_size);
  return {
    number,
    picture,
    calls: game.calls,
    milliseconds: performance.now() - began,
    backend: graphs.backend,
    note: graphs.note,
  };
}

const functions: Record<string, (argument: any) => unknown> = {
  load,
  begin,
  step,
  rewind: (count: number) => {
    game.rewind(count);
    return game.numFrames;
  },
  mark: () => (branch = game.fork()).numFrames,
  back: () => (game = branch!.fork()).numFrames,
  noise: ([seed, frame, count]: [number, number, number]) => seededNoise(seed, frame, count),
};

let queue: Promise<unknown> = Promise.resolve(); // one thing after another
self.onmessage = ({ data: { id, name, argument } }) => {
  queue = queue.then(async () => {
    try {
      const result = await functions[name](argument);
      postMessage({ id, result });
    } catch (error) {
      postMessage({ id, error: error instanceof Error ? error.message : String(error) });
    }
  });
};

function planes(picture: Uint8ClampedArray): Float32Array {
  const count = picture.length / 4, pixels = new Float32Array(3 * count);
  for (let i = 0; i < 3 * count; i++) pixels[i] = picture[4 * (i % count) + Math.floor(i / count)] / 255;
  return pixels;
}

function rgba(pixels: Float32Array, [height, width]: [number, number]): Uint8ClampedArray {
  const count = height * width, picture = new Uint8ClampedArray(4 * count).fill(255);
  for (let i = 0; i < 3 * count; i++) picture[4 * (i % count) + Math.floor(i / count)] = 255 * pixels[i]; // it rounds
  return picture;
}

/** A number of its bits in half precision. */
function fromHalf(bits: number): number {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits & 0x8000 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}
