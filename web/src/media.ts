// Pictures and videos: of the visitor, cut to the model's size, and the game as a file.

import { BufferTarget, CanvasSource, Mp4OutputFormat, Output, WebMOutputFormat, canEncodeVideo } from "mediabunny";

const RATE = 10; // frames a second, of given and of saved videos
const NUM_GIVEN = 16; // frames of a given video: its last ones
const SAVED_SIDE = 256; // pixels that a saved video has at least

type Size = [height: number, width: number];

export function canvasOf([height, width]: Size) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d", { willReadFrequently: true })!;
  pen.imageSmoothingQuality = "high";
  return { canvas, pen };
}

/** The picture, resized to cover the size and cropped at the centre. */
function covered(source: CanvasImageSource, width: number, height: number, size: Size): ImageData {
  const { pen } = canvasOf(size), scale = Math.max(size[1] / width, size[0] / height);
  pen.drawImage(source, (size[1] - width * scale) / 2, (size[0] - height * scale) / 2, width * scale, height * scale);
  return pen.getImageData(0, 0, size[1], size[0]);
}

export async function readPicture(file: File, size: Size): Promise<ImageData[]> {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name} cannot be read as a picture.`);
  });
  return [covered(bitmap, bitmap.width, bitmap.height, size)];
}

/** The last frames of a video that the browser can play, ten of a second. */
export async function readVideo(file: File, size: Size): Promise<ImageData[]> {
  const video = document.createElement("video"), address = URL.createObjectURL(file), frames: ImageData[] = [];
  const heard = (name: string) => new Promise<void>((done, failed) => {
    video.addEventListener(name, () => done(), { once: true });
    video.addEventListener("error", () => failed(new Error(`${file.name} cannot be played by this browser.`)), { once: true });
  });
  try {
    Object.assign(video, { muted: true, preload: "auto" });
    const loaded = heard("loadeddata");
    video.src = address;
    await loaded;
    if (!Number.isFinite(video.duration)) { // as of a recording of the browser: only its end tells
      const found = heard("seeked");
      video.currentTime = 1e6;
      await found;
    }
    const end = video.duration, count = Math.max(1, Math.min(NUM_GIVEN, Math.floor(end * RATE)));
    for (let i = 0; i < count; i++) {
      const shown = heard("seeked");
      video.currentTime = Math.max(0, end - (count - i - 0.5) / RATE);
      await shown;
      frames.push(covered(video, video.videoWidth, video.videoHeight, size));
    }
    return frames;
  } finally {
    URL.revokeObjectURL(address);
  }
}

/** Pictures side by side, as an export has them of its starts. */
export async function readStrip(data: Uint8Array, count: number, size: Size): Promise<ImageBitmap[]> {
  const strip = await createImageBitmap(new Blob([data as BlobPart]));
  return Promise.all(Array.from({ length: count }, (_, i) => createImageBitmap(strip, i * size[1], 0, size[1], size[0])));
}

/** The pictures as mp4 where the browser writes H.264, else as WebM; the file's ending comes with it. */
export async function videoOf(pictures: ImageBitmap[]): Promise<[Blob, string]> {
  const { width, height } = pictures[0], scale = Math.ceil(SAVED_SIDE / Math.min(width, height));
  const size: Size = [2 * Math.round((height * scale) / 2), 2 * Math.round((width * scale) / 2)]; // even, as codecs want
  const { canvas, pen } = canvasOf(size), sides = { width: size[1], height: size[0] };
  const isMp4 = await canEncodeVideo("avc", sides), codecs = isMp4 ? ["avc" as const] : ["vp9" as const, "vp8" as const];
  const able = await Promise.all(codecs.map((codec) => canEncodeVideo(codec, sides))), codec = codecs[able.indexOf(true)];
  if (!codec) throw new Error("This browser cannot write videos (it has no VideoEncoder).");
  const format = isMp4 ? new Mp4OutputFormat() : new WebMOutputFormat(), target = new BufferTarget();
  const output = new Output({ format, target });
  const source = new CanvasSource(canvas, { codec, bitrate: 2e6 });
  output.addVideoTrack(source, { frameRate: RATE });
  await output.start();
  pen.imageSmoothingEnabled = false;
  for (const [i, picture] of pictures.entries()) {
    pen.drawImage(picture, 0, 0, size[1], size[0]);
    await source.add(i / RATE, 1 / RATE);
  }
  await output.finalize();
  return [new Blob([target.buffer!], { type: format.mimeType }), format.fileExtension];
}
