// Files that come with a progress and stay in the browser: the Cache API, by address and hash.

const STORE = "diffusers-far-files";

export interface Expected { bytes: number; sha256: string }

async function store(): Promise<Cache | null> {
  return globalThis.caches ? caches.open(STORE).catch(() => null) : null; // there is none without https
}

async function get(url: string): Promise<Response> {
  const reply = await fetch(url).catch((error) => {
    throw new Error(`${url} cannot be loaded: ${error.message}`);
  });
  if (!reply.ok) throw new Error(`${url} cannot be loaded: the server says ${reply.status} ${reply.statusText}`);
  return reply;
}

/** A file of a known hash: from the cache, or loaded and checked. `tell` hears of every part that arrives. */
export async function loadFile(url: string, expected: Expected, tell: (bytes: number) => void): Promise<Uint8Array> {
  const cache = await store(), key = `${url}?sha256=${expected.sha256}`;
  const kept = await cache?.match(key);
  if (kept) {
    tell(expected.bytes);
    return new Uint8Array(await kept.arrayBuffer());
  }
  const parts: Uint8Array<ArrayBuffer>[] = [], reader = (await get(url)).body!.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    tell(part.value.length);
  }
  const data = await new Blob(parts).arrayBuffer();
  if (data.byteLength !== expected.bytes || !(await hasHash(data, expected.sha256))) {
    const sizes = `${data.byteLength} bytes of ${expected.bytes}`;
    throw new Error(`${url} is broken or not the file that rollout.json names (${sizes} came). Load the page again.`);
  }
  await cache?.put(key, new Response(data)).catch(() => undefined); // full: it plays without
  return new Uint8Array(data);
}

async function hasHash(data: ArrayBuffer, sha256: string): Promise<boolean> {
  if (!globalThis.crypto?.subtle) return true;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

/** JSON as the server has it now, else as it was last. */
export async function loadJson(url: string): Promise<unknown> {
  const cache = await store();
  let reply: Response | undefined;
  try {
    reply = await get(url);
    await cache?.put(url, reply.clone()).catch(() => undefined);
  } catch (error) {
    reply = await cache?.match(url);
    if (!reply) throw error;
  }
  return reply.json().catch(() => {
    throw new Error(`${url} is not JSON. It takes the address of a folder that \`diffusers-far export\` wrote.`);
  });
}

export async function unzipped(data: Uint8Array): Promise<ArrayBuffer> {
  const stream = new Blob([data as BlobPart]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}
