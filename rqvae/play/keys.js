// What held keys and touched buttons mean, by the names of a game's actions. Served beside both pages.

const WORDS = { ArrowUp: "UP", KeyW: "UP", ArrowRight: "RIGHT", KeyD: "RIGHT", ArrowLeft: "LEFT", KeyA: "LEFT",
                ArrowDown: "DOWN", KeyS: "DOWN", Space: "FIRE" };
const COMBINED = /^(UP|DOWN)?(LEFT|RIGHT)?(FIRE)?$/;  // Atari's names: UPRIGHT, LEFTFIRE, DOWNLEFTFIRE

/** The player's wish: the name of an action, or null where nothing is held. */
export class Keys {
  /**
   * @param {function} changed called with the wish whenever a key or a button goes down or up.
   * @param {object} shortcuts functions by the code of a key, such as KeyR.
   */
  constructor(changed, shortcuts) {
    this.actions = []; this.held = []; this.changed = changed;
    const began = new Map();  // what a key meant when it went down: shift or another layout may change it meanwhile
    addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;  // the browser's own
      if (event.target.tagName === "INPUT" && event.target.type !== "range") return;
      const name = this.nameOf(event);
      if (name !== undefined) { event.preventDefault(); if (!event.repeat) { began.set(event.code, name); this.down(name); } }
      else if (shortcuts[event.code] && !event.repeat) shortcuts[event.code]();
    });
    addEventListener("keyup", event => { this.up(began.get(event.code)); began.delete(event.code); });
    addEventListener("blur", () => { began.clear(); if (this.held.length) { this.held = []; this.tell(); } });
  }
  /** The game's actions by name: its buttons are shown, those that it does not have are not. */
  setActions(actions) {
    this.actions = actions;
    const others = actions.filter(name => name === "FIRE" || (!COMBINED.test(name) && name !== "NOOP"));
    document.getElementById("more").replaceChildren(...others.map(name => {
      const button = document.createElement("button");
      button.dataset.name = button.textContent = name;
      return button;
    }));
    document.querySelectorAll("#pad button").forEach(button => { button.disabled = !actions.includes(button.dataset.name); });
    document.querySelectorAll("#pad button, #more button").forEach(button => {
      button.addEventListener("pointerdown", event => { event.preventDefault(); this.down(button.dataset.name); });
      for (const end of ["pointerup", "pointerleave", "pointercancel"]) button.addEventListener(end, () => this.up(button.dataset.name));
    });
  }
  /** Undefined where the game has no such action; one whose name is a single character has that key. */
  nameOf(event) { return [event.key, WORDS[event.code]].find(name => this.actions.includes(name)); }
  down(name) { if (!this.held.includes(name)) { this.held.push(name); this.tell(); } }
  up(name) { if (this.held.includes(name)) { this.held = this.held.filter(other => other !== name); this.tell(); } }
  tell() {
    document.querySelectorAll("[data-name]").forEach(b => b.classList.toggle("on", this.held.includes(b.dataset.name)));
    this.changed(this.wish());
  }
  /** Of keys held together the action that means most of them; of two that exclude each other the one pressed last. */
  wish() {
    const latest = [...this.held].reverse(), find = (...names) => latest.find(name => names.includes(name)) ?? "";
    const upDown = find("UP", "DOWN"), leftRight = find("LEFT", "RIGHT"), fire = find("FIRE");
    const moves = latest.filter(name => name === upDown || name === leftRight);
    const wanted = [upDown + leftRight, ...moves].flatMap(move => [move + fire, move]);
    return [...latest.filter(name => !COMBINED.test(name)), ...wanted, fire].find(name => this.actions.includes(name)) ?? null;
  }
}
