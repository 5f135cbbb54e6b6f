// What is pressed: keys, buttons, a gamepad. Actions that are directions ("forward-left") are held in parts, others by
// their number; groups and vectors stay as they are chosen.

import { ARROWS, KEYS, Walker, directionOf } from "../../src/diffusers_far/browser/directions.js";
import type { Action, Config } from "./exported_rollout";

const GAMEPAD = { forward: [12, 1, -1], back: [13, 1, 1], left: [14, 0, -1], right: [15, 0, 1] }; // button, axis, sign

export class Controls {
  hint = "";
  touched = false; // anything was pressed yet
  private readonly walker = new Walker();
  private readonly held = new Set<string>();
  private readonly names: string[] | null = null; // of directions
  private chosen: number[] | null = null; // of groups or a vector

  constructor(private readonly space: Config["actions"], private readonly pad: HTMLElement, private readonly go: () => void) {
    if (!space) {
      this.hint = "none. It goes on by itself: this model takes no actions.";
      return;
    }
    const names = Array.isArray(space.names) && space.names.every((name) => typeof name === "string") ? space.names : null;
    if (space.kind === "integer") {
      if (names?.every((name) => name in ARROWS)) this.names = names;
      const directions = Object.keys(ARROWS).filter((name) => this.names?.includes(name));
      const numbers = Array.from({ length: space.sizes[0] }, (_, i) => String(i));
      for (const one of this.names ? directions : numbers) this.addButton(one, this.names ? one : (names?.[+one] ?? one));
      this.hint = this.names ? "arrow keys, WASD, a gamepad, or the buttons under the picture. Until you press one, it walks by itself." :
        `0 to ${Math.min(9, space.sizes[0] - 1)}, or the buttons under the picture.`;
    } else {
      this.chosen = Array(space.kind === "groups" ? space.sizes.length : space.sizes[0]).fill(0);
      this.chosen.forEach((_, i) => this.addChoice(i));
      this.hint = "none. What you choose under the picture stays until you change it.";
    }
    this.listen();
  }

  /** What is pressed now. Until something is, a walker that has directions walks by itself, and turns where it sees a wall. */
  action(view: HTMLCanvasElement): Action {
    if (this.chosen) return [...this.chosen];
    if (!this.names) return this.held.size ? Number([...this.held].pop()) : null;
    const held = new Set([...this.held, ...this.onGamepad()]);
    if (held.size) this.touched = true;
    if (!this.touched && this.names.includes("forward")) held.add(this.walker.next(view));
    return directionOf(held, this.names);
  }

  private onGamepad(): string[] {
    const pads = navigator.getGamepads?.() ?? [];
    const isOn = (pad: Gamepad, [button, axis, sign]: number[]) => pad.buttons[button]?.pressed || sign * pad.axes[axis] > 0.5;
    return Object.entries(GAMEPAD).filter(([, place]) => pads.some((pad) => pad && isOn(pad, place))).map(([name]) => name);
  }

  private press(parts: string[], down: boolean): void {
    for (const part of parts) down ? this.held.add(part) : this.held.delete(part);
    for (const button of this.pad.querySelectorAll<HTMLElement>("[data-action]"))
      button.classList.toggle("held", this.parts(button.dataset.action!).every((part) => this.held.has(part)));
    if (!down) return;
    this.touched = true;
    this.go();
  }

  private parts(action: string): string[] {
    return this.names ? action.split("-") : [action];
  }

  private addButton(action: string, name: string): void {
    const button = document.createElement("button");
    button.dataset.action = action;
    button.textContent = this.names ? ARROWS[action] : name;
    button.setAttribute("aria-label", name.replace("-", " ").replace("noop", "stand still"));
    const set = (down: boolean) => (event: Event) => {
      event.preventDefault();
      this.press(this.parts(action), down);
    };
    button.addEventListener("pointerdown", set(true));
    for (const end of ["pointerup", "pointerleave", "pointercancel"]) button.addEventListener(end, set(false));
    button.addEventListener("contextmenu", (event) => event.preventDefault()); // of a long touch
    this.pad.append(button);
  }

  /** A group of actions as a list to choose from, a number of a vector as a field. */
  private addChoice(index: number): void {
    const { kind, sizes, names } = this.space!, list = Array.isArray(names) ? (names[index] as unknown) : null;
    const label = document.createElement("label");
    label.className = "group";
    const field = document.createElement(kind === "groups" ? "select" : "input");
    if (field instanceof HTMLInputElement) {
      Object.assign(field, { type: "number", step: "any", value: "0" });
      label.append(typeof list === "string" ? list : `number ${index + 1}`, field);
    } else {
      const [title, actions] = Object.entries((list as Record<string, string[]> | null) ?? {})[0] ?? [`group ${index + 1}`, null];
      for (let i = 0; i < sizes[index]; i++) field.append(new Option(actions?.[i] ?? String(i), String(i)));
      label.append(title, field);
    }
    field.addEventListener("input", () => {
      this.chosen![index] = Number(field.value) || 0;
      this.go();
    });
    this.pad.append(label);
  }

  private listen(): void {
    const partsOf = (event: KeyboardEvent): string[] => {
      const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
      if (this.chosen) return [];
      if (this.names) return event.code in KEYS ? [KEYS[event.code]] : [];
      return digit && Number(digit) < this.space!.sizes[0] ? [digit] : [];
    };
    document.addEventListener("keydown", (event) => {
      const isField = (event.target as Element).matches("input:not([type=file]), select, textarea");
      const parts = partsOf(event);
      if (isField || event.ctrlKey || event.metaKey || event.altKey || !parts.length) return;
      event.preventDefault();
      if (!event.repeat) this.press(parts, true);
    });
    document.addEventListener("keyup", (event) => this.press(partsOf(event), false));
    // Nobody says so when a key is let go in another window.
    const release = () => this.press([...this.held], false);
    window.addEventListener("blur", release);
    document.addEventListener("visibilitychange", release);
  }
}
