// A dream in the browser: the network's answers by onnxruntime-web, the solver's steps and the noise here.

/** Standard normal numbers: 32 bits of splitmix32 a uniform number, two of which are a pair by Box and Muller. */
export class Noise {
  constructor(seed) { this.state = seed | 0; this.spare = null; }
  uniform() {
    this.state = (this.state + 0x9e3779b9) | 0;
    let z = this.state ^ (this.state >>> 16);
    z = Math.imul(z, 0x21f0aaad); z ^= z >>> 15;
    z = Math.imul(z, 0x735a2d97); z ^= z >>> 15;
    return ((z >>> 0) + 0.5) / 4294967296;
  }
  next() {
    if (this.spare !== null) { const spare = this.spare; this.spare = null; return spare; }
    const radius = Math.sqrt(-2 * Math.log(this.uniform())), angle = 2 * Math.PI * this.uniform();
    this.spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }
  fill(size) { return Float32Array.from({ length: size }, () => this.next()); }
}

const fetched = async (place, name) => {
  const answer = await fetch(new URL(name, place));
  if (!answer.ok) throw new Error(`${name}: expected a file, the server says ${answer.status}`);
  return answer;
};

/** The model and where its dreams begin. */
export class World {
  static async load(ort, place) {
    const world = new World(), options = { executionProviders: ["wasm"], graphOptimizationLevel: "all" };
    world.ort = ort;
    world.facts = await (await fetched(place, "world.json")).json();
    world.starts = new Float32Array(await (await fetched(place, "starts.bin")).arrayBuffer());
    world.frames = new Uint8Array(await (await fetched(place, "frames.bin")).arrayBuffer());
    const models = ["step.onnx", "decode.onnx"].map(async name =>
      ort.InferenceSession.create(new Uint8Array(await (await fetched(place, name)).arrayBuffer()), options));
    [world.step, world.decode] = await Promise.all(models);
    return world;
  }
  get latentSize() { return this.facts.latent_shape.reduce((a, b) => a * b); }
}

/** One dream: the last K frames as latents, and the actions between them. */
export class Dream {
  constructor(world, seed) {
    const { facts } = world, at = seed % facts.starts.length, size = facts.history * world.latentSize;
    this.world = world;
    this.noise = new Noise(seed);
    this.context = world.starts.slice(at * size, (at + 1) * size);
    this.actions = [...facts.starts[at]];
    const bytes = facts.image_shape.reduce((a, b) => a * b);
    this.first = world.frames.subarray(at * bytes, (at + 1) * bytes);
  }

  /** The frame after an action as RGBA bytes; `fresh(size)` gives noise, by default the seed's. */
  async next(action, solver, steps, fresh = size => this.noise.fill(size)) {
    const { facts, ort, latentSize: size } = this.world, history = facts.history;
    const actions = [...this.actions, action];
    const feeds = {
      context: new ort.Tensor("float32", this.context, [1, history, ...facts.latent_shape]),
      actions: new ort.Tensor("int64", BigInt64Array.from(actions, BigInt), [1, history]),
      mask: new ort.Tensor("bool", new Uint8Array(history).fill(1), [1, history]),
    };
    let x = fresh(size);
    for (const [t, ofX, ofPrediction, ofNoise] of facts.solvers[solver][steps]) {
      feeds.x = new ort.Tensor("float32", x, [1, ...facts.latent_shape]);
      feeds.t = new ort.Tensor("float32", [t], [1]);
      const { prediction } = await this.world.step.run(feeds), z = ofNoise ? fresh(size) : null, after = new Float32Array(size);
      for (let i = 0; i < size; i++) after[i] = ofX * x[i] + ofPrediction * prediction.data[i] + (z ? ofNoise * z[i] : 0);
      x = after;
    }
    const { frame } = await this.world.decode.run({ zs: new ort.Tensor("float32", x, [1, ...facts.latent_shape]) });
    this.context.copyWithin(0, size); this.context.set(x, (history - 1) * size);
    this.actions = actions.slice(1);
    return rgba(frame.data, facts.image_shape);
  }
}

/** (3, H, W) numbers in [0, 1] as the bytes of a canvas. */
export const rgba = (numbers, [, height, width]) => {
  const pixels = height * width, bytes = new Uint8ClampedArray(4 * pixels).fill(255);
  for (let i = 0; i < pixels; i++) for (let c = 0; c < 3; c++) bytes[4 * i + c] = Math.round(255 * numbers[c * pixels + i]);
  return bytes;
};
