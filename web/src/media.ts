// Pictures and videos: of the visitor, cut to the model's size, and the game as a file.

import {
  BlobSource, BufferTarget, CanvasSink, CanvasSource, Input, MATROSKA, MP4, Mp4OutputFormat, Output, QTFF, WEBM, WebMOutputFormat,
  canEncodeVideo,
} from "mediabunny";

const RATE = 10; // frames a second, of given and of saved videos
const NUM_GIVEN = 16; // frames of a given video: its last ones
const SAVED_SIDE = 256; // pixels that a saved video has at least

type Size = [height: number, width: number];

function canvasOf([height, width]: Size) {
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

/** The last frames of a video that the browser can decode, ten of a second. */
export async function readVideo(file: File, size: Size): Promise<ImageData[]> {
  // Not by a video element that is sent to each moment: it may say that it is there and still draw black.
  const input = new Input({ source: new BlobSource(file), formats: [MP4, QTFF, WEBM, MATROSKA] });
  try {
    const track = await input.getPrimaryVideoTrack(), frames: ImageData[] = [];
    if (!track || !(await track.canDecode())) throw new Error("no track that this browser decodes");
    const begin = await track.getFirstTimestamp(), end = await track.computeDuration();
    const count = Math.max(1, Math.min(NUM_GIVEN, Math.floor((end - begin) * RATE)));
    const times = Array.from({ length: count }, (_, i) => Math.max(begin, end - (count - i - 0.5) / RATE));
    for await (const found of new CanvasSink(track).canvasesAtTimestamps(times)) {
      if (found) frames.push(covered(found.canvas, found.canvas.width, found.canvas.height, size));
    }
    if (!frames.length) throw new Error("no frames");
    return frames;
  } catch (error) {
    throw new Error(`${file.name} cannot be played by this browser.`, { cause: error });
  } finally {
    input.dispose();
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
