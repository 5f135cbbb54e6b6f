// A running video from exported graphs: src/diffusers_far/export/exported_rollout.py, in docs/export.md's words.

import type { Call } from "./frame_plan";
import { FramePlan, MISSING } from "./frame_plan";
import { seededNoise } from "./noise";

export type Numbers = Float32Array | Int32Array | Uint16Array; // the last: half precision, never looked into
export type Tensors = Record<string, Numbers>;
export type Action = number | number[] | null;
/** Runs a graph on inputs by name; its outputs, in order. Neither is changed in place. */
export type Run = (graph: string, inputs: Tensors) => Promise<Numbers[]>;

export interface Sampler { timesteps: number[]; ends: number[]; weights: number[][] }
export interface TensorInfo { name: string; dtype: "float32" | "float16" | "int32"; shape: number[] }
export interface Start { num_frames: number; latents: string; picture: string; actions: Action[] | null }
/** rollout.json */
export interface Config {
  version: number;
  dtype: string;
  latent_shape: number[];
  frame_size: [number, number];
  ring_frames: number;
  window_frames: number;
  rope_frequencies: number[];
  flex_rope_slope: number;
  actions: { kind: "integer" | "groups" | "vector"; sizes: number[]; names: unknown } | null;
  num_classes: number | null;
  num_inference_steps: number;
  samplers: Record<string, Sampler>;
  graphs: Record<string, { file: string; weights: string | null; inputs: TensorInfo[]; outputs: TensorInfo[] }>;
  starts: Start[];
  files: Record<string, { bytes: number; sha256: string }>;
}

export interface Settings {
  seed: number;
  classLabel?: number | null;
  guidanceScale?: number; // 1: with the conditions, 0: without, else a mix
  flexRopeSlope?: number;
  maxRewind?: number; // frames that can be taken back; latents of older ones are forgotten
}

export const product = (sizes: number[]) => sizes.reduce((a, b) => a * b, 1);
const ARRAYS = { float32: Float32Array, float16: Uint16Array, int32: Int32Array };

export class ExportedRollout {
  plan: FramePlan;
  calls: Call[] = []; // that made the last frame: commits, then the step
  private latents = new Map<number, Float32Array>(); // of the frames from plan.firstKept on
  private actions = new Map<number, Action>();
  private caches: Tensors[]; // keys and values, without conditions and with them where guidance needs both
  private readonly conditioned: boolean[];
  private readonly count: number;

  constructor(readonly config: Config, private readonly run: Run, readonly settings: Settings) {
    this.plan = new FramePlan(config.ring_frames, config.window_frames, settings.maxRewind);
    this.count = product(config.latent_shape);
    const scale = settings.guidanceScale ?? 1;
    this.conditioned = scale === 0 || scale === 1 ? [scale !== 0] : [false, true];
    const cached = config.graphs.step.inputs.filter((one) => /_(keys|values)$/.test(one.name));
    const empty = () => cached.map((one) => [one.name, new ARRAYS[one.dtype](product(one.shape))]);
    this.caches = this.conditioned.map(() => Object.fromEntries(empty()));
  }

  get numFrames(): number {
    return this.plan.numFrames;
  }

  /** Another video that goes on from here: calls replace keys and values, and never change them. */
  fork(): ExportedRollout {
    const branch: ExportedRollout = Object.create(ExportedRollout.prototype);
    const own = { plan: this.plan.copy(), latents: new Map(this.latents), actions: new Map(this.actions) };
    return Object.assign(branch, this, own, { caches: this.caches.map((cache) => ({ ...cache })) });
  }

  rewind(count: number): void {
    this.plan.rewind(count);
    for (const kept of [this.latents, this.actions])
      for (const frame of kept.keys()) if (frame >= this.numFrames) kept.delete(frame);
  }

  /** Let a given frame follow: pixels [3, H, W] in [0, 1]. */
  async append(pixels: Float32Array, action: Action = null): Promise<void> {
    this.appendLatents((await this.run("encode", { pixels }))[0] as Float32Array, action);
  }

  appendLatents(latents: Float32Array, action: Action = null): void {
    const frame = this.plan.addFrame();
    this.latents.set(frame, latents);
    this.actions.set(frame, action);
    this.latents.delete(this.plan.firstKept - 1); // one comes, so at most one goes
    this.actions.delete(this.plan.firstKept - 1);
  }

  /** Pixels [3, H, W] in [0, 1] of a frame. */
  async decode(frame: number): Promise<Float32Array> {
    return (await this.run("decode", { latents: this.latents.get(frame)! }))[0] as Float32Array;
  }

  /** Make the next frame with so many denoising steps; its latents. */
  async step(action: Action, numSteps = this.config.num_inference_steps): Promise<Float32Array> {
    const sampler = this.config.samplers[numSteps], before = this.plan.copy();
    try {
      const calls = this.plan.nextFrame(), step = calls[calls.length - 1];
      for (const call of calls.slice(0, -1)) await this.commit(call);
      const noise = seededNoise(this.settings.seed, this.numFrames, this.count), known = [noise];
      let latents = noise;
      for (const [k, weights] of sampler.weights.entries()) {
        known.push(await this.velocity(step, latents, sampler.timesteps[k], sampler.ends[k], action));
        latents = noise.map((_, i) => weights.reduce((sum, weight, j) => sum + weight * known[j][i], 0));
      }
      if (!latents.every(Number.isFinite)) throw new Error(`frame ${this.numFrames} came out with infinite values`);
      this.calls = calls;
      this.appendLatents(latents, action);
      return latents;
    } catch (error) {
      // A ring that was half brought up to date is computed anew.
      this.plan = Object.assign(before, { slots: before.slots.map(() => MISSING), window: null });
      throw error;
    }
  }

  private async commit(call: Call): Promise<void> {
    const latents = new Float32Array(call.frames.length * this.count);
    call.frames.forEach((frame, i) => frame >= 0 && latents.set(this.latents.get(frame)!, i * this.count));
    const inputs = { latents, frame_ages: Int32Array.from(call.frame_ages), slot: Int32Array.of(call.slot) };
    const actions = call.frames.map((frame) => this.actions.get(frame) ?? null);
    for (const [i, cache] of this.caches.entries()) {
      const results = await this.runFrames(call, inputs, actions, cache, this.conditioned[i]);
      this.caches[i] = Object.fromEntries(Object.keys(cache).map((name, j) => [name, results[j]]));
    }
  }

  private async velocity(call: Call, latents: Float32Array, level: number, end: number, action: Action) {
    const inputs = {
      latents,
      timestep: Float32Array.of(level),
      timestep_r: Float32Array.of(end),
      window_ages: Int32Array.from(call.window_ages),
    };
    const found: Float32Array[] = [];
    for (const [i, cache] of this.caches.entries())
      found.push((await this.runFrames(call, inputs, [action], cache, this.conditioned[i]))[0] as Float32Array);
    const [first, guided] = found, scale = this.settings.guidanceScale ?? 1;
    return guided ? first.map((value, i) => value + scale * (guided[i] - value)) : first;
  }

  private runFrames(call: Call, inputs: Tensors, actions: Action[], cache: Tensors, conditioned: boolean) {
    const angles = call.frames.flatMap((frame) => this.config.rope_frequencies.map((one) => Math.max(frame, 0) * one));
    const all: Tensors = {
      ...inputs,
      ...cache,
      frame_rotary: Float32Array.from([...angles.map(Math.cos), ...angles.map(Math.sin)]),
      flex_rope_slope: Float32Array.of(this.settings.flexRopeSlope ?? this.config.flex_rope_slope),
      ring_ages: Int32Array.from(call.ring_ages),
      class_labels: Int32Array.of((conditioned ? this.settings.classLabel : null) ?? MISSING),
    };
    const space = this.config.actions;
    if (space) {
      const width = space.kind === "integer" ? 1 : space.kind === "groups" ? space.sizes.length : space.sizes[0];
      const none = Array(width).fill(space.kind === "vector" ? NaN : MISSING);
      const rows = actions.flatMap((action) => (action === null || !conditioned ? none : action));
      all.actions = space.kind === "vector" ? Float32Array.from(rows) : Int32Array.from(rows);
    }
    const names = this.config.graphs[call.graph].inputs.map((one) => one.name);
    return this.run(call.graph, Object.fromEntries(names.map((name) => [name, all[name]])));
  }
}
