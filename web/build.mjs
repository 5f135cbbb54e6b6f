// Builds dist/: the page, its worker, and ONNX Runtime's files, WASM compressed as servers may not.

import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

process.chdir(fileURLToPath(new URL(".", import.meta.url)));
const runtime = "node_modules/onnxruntime-web/dist/";
const hash = (data) => createHash("sha256").update(data).digest("hex");
const runtimes = {};

rmSync("dist", { recursive: true, force: true });
mkdirSync("dist");
for (const [backend, name] of [["wasm", "ort-wasm-simd-threaded"], ["webgpu", "ort-wasm-simd-threaded.asyncify"]]) {
  const data = gzipSync(readFileSync(`${runtime}${name}.wasm`), { level: 9 });
  const wasm = `${name}.wasm.bin`; // not .gz: some servers would have the browser unpack that
  writeFileSync(`dist/${wasm}`, data);
  cpSync(`${runtime}${name}.mjs`, `dist/${name}.mjs`);
  runtimes[backend] = { module: `${name}.mjs`, wasm, file: { bytes: data.length, sha256: hash(data) } };
}
const options = { bundle: true, minify: true, target: "es2022", outdir: "dist", logLevel: "warning" };
await build({
  ...options,
  entryPoints: ["src/main.ts", "src/worker.ts"],
  format: "esm",
  splitting: true,
  chunkNames: "[name]-[hash]",
  conditions: ["onnxruntime-web-use-extern-wasm"],
  define: { RUNTIMES: JSON.stringify(runtimes) },
});
for (const name of ["index.html", "style.css"]) cpSync(`src/${name}`, `dist/${name}`);
const files = readdirSync("dist").filter((name) => !name.endsWith(".bin"));
const version = hash(files.map((name) => hash(readFileSync(`dist/${name}`))).join()).slice(0, 16);
await build({
  ...options,
  entryPoints: ["src/service_worker.ts"],
  define: { FILES: JSON.stringify(["./", ...files]), VERSION: JSON.stringify(version) },
});
