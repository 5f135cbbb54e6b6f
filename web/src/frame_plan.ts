// Which graph runs when, on which frames, into which slot: src/diffusers_far/export/frame_plan.py, line by line.

export const MISSING = -1;
export const MAX_REWIND = 1024;

/** One run of a graph: numbers of frames, and ages counted back from the frame to make. */
export interface Call {
  graph: "commit" | "step";
  frames: number[];
  frame_ages: number[];
  slot: number;
  ring_ages: number[];
  window_ages: number[];
}

export class FramePlan {
  numFrames = 0;
  firstKept = 0; // the oldest frame whose latents may be needed again
  slots: number[]; // number of the frame in each slot of the ring
  window: number[] | null = null; // frames of the window as it was computed last

  constructor(readonly ringFrames: number, readonly windowFrames: number, readonly maxRewind = MAX_REWIND) {
    this.slots = Array(Math.max(1, ringFrames)).fill(MISSING);
  }

  copy(): FramePlan {
    const copy = new FramePlan(this.ringFrames, this.windowFrames, this.maxRewind);
    return Object.assign(copy, this, { slots: [...this.slots] });
  }

  addFrame(): number {
    this.numFrames += 1;
    const context = this.ringFrames + this.windowFrames;
    this.firstKept = Math.max(this.firstKept, this.numFrames - this.maxRewind - context);
    return this.numFrames - 1;
  }

  /** How many frames can be taken back: up to the first, or as far as the context is kept. */
  get rewindable(): number {
    const context = this.ringFrames + this.windowFrames;
    return this.numFrames - (this.firstKept ? this.firstKept + context : 0);
  }

  rewind(count: number): void {
    if (!(count >= 0 && count <= this.rewindable))
      throw new Error(`cannot go back ${count} frames: ${this.rewindable} of ${this.numFrames} can be taken back`);
    this.numFrames -= count;
    this.slots = this.slots.map((frame) => (frame < this.numFrames ? frame : MISSING));
    if (this.window?.some((frame) => frame >= this.numFrames)) this.window = null;
  }

  get firstWindowFrame(): number {
    return Math.max(0, this.numFrames - this.windowFrames);
  }

  get firstFrame(): number {
    return Math.max(0, this.firstWindowFrame - this.ringFrames);
  }

  /** The calls that lead to the next frame: commits, then the step, to be run once per denoising step. */
  nextFrame(): Call[] {
    const next = this.numFrames, first = this.firstFrame, end = this.firstWindowFrame;
    // 1. Frames that are out of the context are seen no more, also not by frames that are kept now.
    this.slots = this.slots.map((frame) => (frame >= first && frame < end ? frame : MISSING));
    // 2. Frames of the ring that are not in it yet are committed, oldest first.
    let pending = range(first, end).filter((frame) => !this.slots.includes(frame));
    const window = range(next - this.windowFrames, next).map((frame) => Math.max(frame, MISSING));
    const known = this.window !== null && window.every((frame, i) => frame === this.window![i]);
    if (this.windowFrames && !pending.length && !known && next > 0) pending = [MISSING];
    const calls: Call[] = [];
    for (const frame of pending) {
      const slot = frame === MISSING ? MISSING : frame % this.slots.length;
      calls.push(this.call("commit", this.windowFrames ? [frame, ...window] : [frame], slot));
      if (slot !== MISSING) this.slots[slot] = frame;
    }
    this.window = window;
    // 3. The frame is made from noise, seeing the ring and the window.
    return [...calls, this.call("step", [next], MISSING)];
  }

  private call(graph: Call["graph"], frames: number[], slot: number): Call {
    const ages = (list: number[]) => list.map((frame) => (frame === MISSING ? MISSING : this.numFrames - frame));
    const window = graph === "commit" ? [] : (this.window ?? []);
    return { graph, frames, frame_ages: ages(frames), slot, ring_ages: ages(this.slots), window_ages: ages(window) };
  }
}

function range(first: number, end: number): number[] {
  return Array.from({ length: Math.max(0, end - first) }, (_, i) => first + i);
}
