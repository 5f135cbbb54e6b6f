// Actions that are directions, of the app and of the page in web/: what is pressed, and a walker that walks by itself.

/** @type {Record<string, string>} */
export const KEYS = {
  ArrowUp: "forward", KeyW: "forward", ArrowLeft: "left", KeyA: "left", ArrowRight: "right", KeyD: "right",
  ArrowDown: "back", KeyS: "back",
};
/** @type {Record<string, string>} */
export const ARROWS = {
  "forward-left": "↖", forward: "↑", "forward-right": "↗", left: "←", noop: "·", right: "→", back: "↓",
};
const WALL = 12; // levels by which the parts of a picture differ, at least, if it is more than a wall
const TURN = 4; // frames in which a walker turns away from one

/**
 * The number of the action for what is held: of "forward-left" for both, else of one of them, else of nothing.
 * @param {Set<string>} held
 * @param {string[]} names of all actions
 * @returns {number | null} null if there is no such action
 */
export function directionOf(held, names) {
  const turn = held.has("left") ? "left" : held.has("right") ? "right" : "";
  const walk = held.has("forward") ? "forward" : held.has("back") ? "back" : "";
  const found = [walk && turn && `${walk}-${turn}`, walk, turn, "noop"].find((name) => name && names.includes(name));
  return found ? names.indexOf(found) : null;
}

/** Goes forward, and turns where it sees a wall. */
export class Walker {
  turning = 0; // frames still to turn

  /**
   * What it holds for the next frame.
   * @param {HTMLCanvasElement} view
   */
  next(view) {
    this.turning = isWall(view) ? TURN : Math.max(0, this.turning - 1);
    return this.turning ? "left" : "forward";
  }
}

/**
 * Whether a picture is much the same all over.
 * @param {HTMLCanvasElement} view
 */
function isWall(view) {
  const small = document.createElement("canvas");
  Object.assign(small, { width: 4, height: 4 });
  const pen = /** @type {CanvasRenderingContext2D} */ (small.getContext("2d", { willReadFrequently: true }));
  pen.imageSmoothingQuality = "high";
  pen.drawImage(view, 0, 0, 4, 4);
  const { data } = pen.getImageData(0, 0, 4, 4);
  const mean = (/** @type {number[]} */ list) => list.reduce((a, b) => a + b) / list.length;
  return mean([0, 1, 2].map((channel) => {
    const levels = [...data].filter((_, i) => i % 4 === channel), middle = mean(levels);
    return Math.sqrt(mean(levels.map((level) => (level - middle) ** 2)));
  })) < WALL;
}
