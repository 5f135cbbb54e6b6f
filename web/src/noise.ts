// Threefry-2x32 with 20 rounds, and Box-Muller: the noise of docs/export.md, as in src/diffusers_far/export/noise.py.

const ROTATIONS = [13, 15, 26, 6, 17, 29, 16, 24];
const PARITY = 0x1bd11bda;
const WORD = 2 ** 32;

export function threefry(key: [number, number], counter: [number, number]): [number, number] {
  const keys = [key[0], key[1], key[0] ^ key[1] ^ PARITY];
  let x = (counter[0] + keys[0]) >>> 0, y = (counter[1] + keys[1]) >>> 0;
  for (let turn = 0; turn < 20; turn++) {
    const rotation = ROTATIONS[turn % 8];
    x = (x + y) >>> 0;
    y = ((y << rotation) | (y >>> (32 - rotation))) ^ x;
    if (turn % 4 === 3) {
      const group = (turn + 1) / 4;
      x = (x + keys[group % 3]) >>> 0;
      y += keys[(group + 1) % 3] + group;
    }
    y >>>= 0;
  }
  return [x, y];
}

/** Standard normal numbers: `count` of the noise of a frame of the video of a seed, 0 to 2 ** 53 - 1. */
export function seededNoise(seed: number, frame: number, count: number): Float32Array {
  const noise = new Float32Array(count), key: [number, number] = [seed % WORD, Math.floor(seed / WORD)];
  for (let i = 0; i < count; i += 2) {
    const [x, y] = threefry(key, [i / 2, frame]);
    const radius = Math.sqrt(-2 * Math.log((x + 0.5) / WORD)), angle = 2 * Math.PI * (y / WORD);
    noise[i] = radius * Math.cos(angle);
    if (i + 1 < count) noise[i + 1] = radius * Math.sin(angle);
  }
  return noise;
}
