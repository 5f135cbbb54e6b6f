// The graphs of an export in ONNX Runtime: on WebGPU where there is, else in WASM. A GPU that is lost costs nothing:
// keys and values lie in ordinary memory, so the call that failed is run again in WASM.

import type * as Ort from "onnxruntime-web";
import type { Config, Numbers, Tensors } from "./exported_rollout";
import type { Expected } from "./files";
import { loadFile, loadJson, unzipped } from "./files";

export type Backend = "webgpu" | "wasm";
const PACKED = ".packed"; // what a file's compressed copy ends with
/** How the build calls ONNX Runtime's files, see build.mjs. */
declare const RUNTIMES: Record<Backend, { module: string; wasm: string; file: Expected }>;

export class Graphs {
  backend: Backend = "wasm";
  note = ""; // why it is not on WebGPU, if it was to be
  readonly threads = self.crossOriginIsolated ? Math.max(1, Math.min(4, navigator.hardwareConcurrency || 1)) : 1;
  private ort!: typeof Ort;
  private sessions: Record<string, Promise<Ort.InferenceSession>> = {};
  private lost: Promise<never> = new Promise(() => undefined);

  private constructor(
    readonly folder: string, readonly config: Config, private readonly tell: (loaded: number, total: number) => void,
  ) {}

  /** Load what the first frame needs from the address of a folder of `diffusers-far export`. */
  static async load(folder: string, backend: Backend | null, tell: (loaded: number, total: number) => void) {
    const config = checked(await loadJson(folder + "rollout.json"), folder);
    const graphs = new Graphs(folder, config, tell);
    graphs.backend = backend ?? (await bestBackend(config));
    await graphs.open();
    return graphs;
  }

  async run(name: string, inputs: Tensors): Promise<Numbers[]> {
    const infos = this.config.graphs[name].inputs, backend = this.backend;
    const feeds = infos.map(({ name, dtype, shape }) => [name, new this.ort.Tensor(dtype, inputs[name], shape)]);
    try {
      const session = await (this.sessions[name] ??= this.session(name));
      const results = await Promise.race([session.run(Object.fromEntries(feeds)), this.lost]);
      return this.config.graphs[name].outputs.map((output) => {
        const data = results[output.name].data;
        // Half precision is kept as its bits, which every browser has.
        return (output.dtype === "float16" ? new Uint16Array((data as Uint16Array).buffer) : data) as Numbers;
      });
    } catch (error) {
      if (backend === "wasm") throw error;
      if (this.backend === backend) await this.fallBack(error);
      return this.run(name, inputs);
    }
  }

  /** A file of the export, from its compressed copy where there is one. */
  async file(name: string, tell: (bytes: number) => void = () => undefined): Promise<Uint8Array> {
    const { files } = this.config, packed = name + PACKED;
    if (!files[packed]) return loadFile(this.folder + name, files[name], tell);
    return new Uint8Array(await unzipped(await loadFile(this.folder + packed, files[packed], tell)));
  }

  private async open(): Promise<void> {
    const { module, wasm, file } = RUNTIMES[this.backend], { graphs, files } = this.config;
    const names = [graphs.step.file, graphs.commit.file, graphs.decode.file, graphs.step.weights!];
    const total = names.reduce((sum, name) => sum + (files[name + PACKED] ?? files[name]).bytes, file.bytes);
    let loaded = 0;
    const tell = (bytes: number) => this.tell((loaded += bytes), total);
    const [binary, ...data] = await Promise.all([
      loadFile(new URL(wasm, self.location.href).href, file, tell), ...names.map((name) => this.file(name, tell)),
    ]);
    const read = Object.fromEntries(names.map((name, i) => [name, data[i]])); // once: not every page has a cache
    this.ort = this.backend === "webgpu" ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
    const { env } = this.ort;
    env.logLevel = "error";
    env.wasm.numThreads = this.threads;
    env.wasm.wasmPaths = { mjs: new URL(module, self.location.href).href };
    env.wasm.wasmBinary = await unzipped(binary);
    try {
      for (const name of ["step", "commit", "decode"]) await (this.sessions[name] = this.session(name, read));
      if (this.backend === "webgpu") this.watch(await this.ort.env.webgpu.device);
    } catch (error) {
      if (this.backend === "wasm") throw new Error(`The model cannot be run: ${(error as Error).message}`);
      await this.fallBack(error);
    }
  }

  private async session(name: string, read: Record<string, Uint8Array> = {}): Promise<Ort.InferenceSession> {
    const { file, weights } = this.config.graphs[name];
    const externalData = weights ? [{ path: weights, data: read[weights] ?? (await this.file(weights)) }] : [];
    const options = { executionProviders: [this.backend], externalData, logSeverityLevel: 3 as const };
    return this.ort.InferenceSession.create(read[file] ?? (await this.file(file)), options);
  }

  private watch(device: { lost: Promise<{ message: string }> }): void {
    this.lost = device.lost.then((info) => {
      throw new Error(`the GPU was lost (${info.message || "no reason given"})`);
    });
    this.lost.catch(() => undefined); // it is heard of with the next run
  }

  private async fallBack(error: unknown): Promise<void> {
    this.backend = "wasm";
    this.note = `WebGPU failed, so this runs on the CPU: ${(error as Error).message}`;
    this.lost = new Promise(() => undefined);
    this.sessions = {};
    await this.open();
  }
}

async function bestBackend(config: Config): Promise<Backend> {
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<{ features: Set<string> } | null> } }).gpu;
  const adapter = await gpu?.requestAdapter().catch(() => null);
  if (!adapter || (config.dtype === "float16" && !adapter.features.has("shader-f16"))) return "wasm";
  return "webgpu";
}

function checked(value: unknown, folder: string): Config {
  const config = value as Config | null;
  const parts = ["step", "commit", "decode", "encode"].map((name) => config?.graphs?.[name]);
  const isWhole = parts.every((graph) => graph && config!.files?.[graph.file]) && config!.samplers && config!.starts;
  if (!isWhole) throw new Error(`${folder}rollout.json is not of an export of diffusers-far that this page knows.`);
  if (config!.version !== 1)
    throw new Error(`${folder}rollout.json has version ${config!.version}; this page knows version 1.`);
  return config!;
}
