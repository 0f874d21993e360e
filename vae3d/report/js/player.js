// The player of a chapter: all pictures of one clip in step, side by side, wiped, blinking, or from inside a panorama.
"use strict";

const MAX_ZOOM = 32;
const MAX_ENLARGED = 6; // of small pictures that are not zoomed
const SHARP_FROM = 2; // screen pixels per pixel from which on pixels are shown as squares
const LENS_FACTOR = 4;
const SPEEDS = [0.1, 0.25, 0.5, 1, 2];
const GAINS = [1, 2, 4, 8, 16, 32];
const DOUBLE_TAP = 350; // milliseconds between two
const BLINKS = [0, 1, 2, 3]; // changes per second; faster ones can harm people with epilepsy

const MAPS = {
  error: "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4",
  change: "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
}; // inferno and viridis
const LAYERS = { picture: "Picture", error: "Error", change: "Change" };
const MEANINGS = {
  error: "|original − reconstruction|, mean of R, G, B",
  change: "|frame − frame before|, mean of R, G, B",
};

// How clips are looked at. It stays when another video is opened, so that the same place is compared.
const look = {
  view: "grid",
  layer: "picture",
  layers: {}, // of single panels
  a: null,
  b: null,
  gain: 1,
  zoom: { k: 1, x: 0.5, y: 0.5 }, // x, y: the place in the middle, in [0, 1]
  lens: false,
  lensAt: { x: 0.5, y: 0.5 },
  wipe: 0.5,
  blink: calm() ? 0 : 2,
  shown: "a",
  loop: true,
  speed: 1,
  direction: { yaw: 0, pitch: 0, field: 90 },
};

// SVG filters that give grey the colours of MAPS. Gain is one for all panels, so that colours compare.
function installFilters() {
  const filters = Object.entries(MAPS).map(([layer, colours]) => {
    const table = (channel) => colours.split(" ").map((hex) => parseInt(hex.slice(2 * channel, 2 * channel + 2), 16) / 255).join(" ");
    const functions = ["R", "G", "B"].map((name, channel) => svg(`feFunc${name}`, { type: "table", tableValues: table(channel) }));
    return svg(
      "filter",
      { id: `map-${layer}`, "color-interpolation-filters": "sRGB", x: "0", y: "0", width: "1", height: "1" },
      svg("feColorMatrix", { class: "gain", type: "matrix" }),
      svg("feComponentTransfer", {}, functions),
    );
  });
  document.body.append(svg("svg", { class: "filters", width: "0", height: "0", "aria-hidden": "true" }, filters));
  setGain(look.gain);
}

function setGain(gain) {
  look.gain = gain;
  const row = `${gain / 3} ${gain / 3} ${gain / 3} 0 0`;
  for (const matrix of document.querySelectorAll(".filters .gain")) {
    matrix.setAttribute("values", `${row} ${row} ${row} 0 0 0 1 0`);
  }
}

class Player {
  // step(count) opens the video that is `count` rows further; changed() is called when a link would be another.
  constructor(chapter, { step, changed }) {
    this.chapter = chapter;
    this.changed = changed;
    this.slots = [];
    this.frame = 0;
    this.pointers = new Map();
    this.tapped = -Infinity;
    this.probe = el("canvas", { height: 1 }).getContext("2d", { willReadFrequently: true });

    this.name = el("h3", { class: "name" });
    this.position = el("span", { class: "position" });
    this.badge = el("span", { class: "badge", hidden: true });
    this.files = el("span", { class: "files" });
    const title = el(
      "div",
      { class: "player-title" },
      button("left", "Previous video", () => step(-1), { key: "p" }),
      button("right", "Next video", () => step(1), { key: "n" }),
      this.name,
      this.badge,
      this.position,
      this.files,
    );
    this.stage = el("div", { class: "stage", tabindex: "0", role: "group", "aria-label": "Pictures" });
    this.pixel = el("output", { class: "pixel" });
    this.bars = el("div", { class: "bars" });
    this.about = el("div", { class: "about" });
    this.curves = el("div", {});
    this.root = el(
      "div",
      { class: "player" },
      title,
      this.#toolbar(),
      this.stage,
      el("div", { class: "status" }, this.pixel, this.bars),
      this.#transport(),
      this.about,
      this.curves,
    );
    this.#listen();
    this.#syncControls();
    this.resized = new ResizeObserver(() => this.#fit());
    this.resized.observe(this.stage);
  }

  // Opens a video; a clip that was open is closed. Errors are shown in its place.
  async open(video, { frame = 0, play = false, rank = "", position = "" } = {}) {
    this.close();
    const token = (this.token = {});
    this.video = video;
    this.root.classList.remove("unopened");
    this.name.textContent = video.name;
    this.position.textContent = position;
    this.badge.textContent = rank;
    this.badge.className = `badge ${rank}`;
    this.badge.hidden = !rank;
    this.files.replaceChildren(...links(video.links));
    this.about.replaceChildren(...warnings(video.warnings));
    this.root.classList.add("loading");
    try {
      if (!video.clip) throw new Error(video.why || "This video has no moving pictures here.");
      const clip = await loadClip(video.id);
      if (this.token !== token) return;
      this.media = new Media(clip, {
        onframe: (shown) => this.token === token && this.#showFrame(shown),
        onplay: (playing) => this.token === token && this.#showPlaying(playing),
      });
      await this.media.open();
      if (this.token !== token) return;
      this.clip = clip;
      this.#ready(frame, play);
    } catch (error) {
      if (this.token !== token) return;
      this.close();
      this.video = video;
      this.stage.replaceChildren(el("p", { class: "missing", role: "alert" }, error.message));
      this.stage.style.removeProperty("height");
      this.#syncControls();
    }
    this.root.classList.remove("loading");
    this.changed();
  }

  // Shows a button instead of a video.
  offer(content) {
    this.close();
    this.root.classList.add("unopened");
    this.curves.style.removeProperty("min-height");
    this.about.replaceChildren();
    this.stage.replaceChildren(el("p", { class: "missing" }, content));
    this.#syncControls();
  }

  close() {
    this.token = null;
    clearInterval(this.timer);
    this.#closeSlots();
    this.media?.close();
    this.chart?.destroy();
    this.curves.style.minHeight = `${this.curves.offsetHeight}px`; // nothing jumps while the next one loads
    this.curves.replaceChildren();
    this.media = this.clip = this.chart = this.video = null;
  }

  #ready(frame, play) {
    const { clip } = this;
    const names = this.#names();
    if (!names.includes(look.a)) look.a = names[0];
    if (!names.includes(look.b) || look.b === look.a) look.b = names.find((name) => name !== look.a) ?? look.a;
    if (look.view === "panorama" && !this.video.panorama) look.view = "grid";
    if (names.length < 2 && look.view !== "panorama") look.view = "grid";
    const facts = { ...this.video.facts, ...this.#clipFacts() };
    this.about.append(
      el("dl", { class: "facts" }, Object.entries(facts).map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value)))),
      ...clip.notes.map((note) => el("p", { class: "note" }, note)),
    );
    this.scrubber.max = this.number.max = Math.max(clip.frames - 1, 0);
    this.total.textContent = `/ ${clip.frames - 1}`;
    this.worst = worstFrames(this.chapter, clip.curves ?? {});
    this.marks.replaceChildren(...this.worst.map((one, index) => this.#mark(one, this.worst.slice(0, index).filter(({ frame: other }) => other === one.frame).length)));
    this.chart = curvesOf(this.chapter, clip.curves ?? {}, clip.frames, (at) => this.lookAt(at));
    this.curves.replaceChildren(this.chart);
    this.curves.style.removeProperty("min-height");
    this.chart.start();
    this.build();
    this.#applyPlayback();
    this.goTo(frame);
    if (play && this.media.moving) this.media.play();
  }

  #clipFacts() {
    const { source, frames, fps } = this.clip;
    const picture = this.clip.panels[0];
    const facts = { size: `${source[1]} x ${source[0]}` };
    if (picture.width !== source[1]) facts["shown as"] = `${picture.width} x ${picture.height}, reduced`;
    if (frames > 1) facts.length = `${frames} frames, ${Number((frames / fps).toFixed(2))} s at ${Number(fps.toFixed(3))} fps`;
    return facts;
  }

  // ---- Controls

  #toolbar() {
    this.views = choice(
      "View",
      { grid: ["Side by side", "1"], wipe: ["Wipe", "2"], blink: ["Blink", "3"], panorama: ["Turn", "4"] },
      (view) => this.setView(view),
    );
    this.layers = choice("Layer of all pictures", { picture: ["Picture", "o"], error: ["Error", "e"], change: ["Change", "c"] }, (layer) =>
      this.setLayer(layer),
    );
    this.pair = el("span", { class: "pair-choice" });
    this.blinkRate = select("Blink", BLINKS.map((rate) => [String(rate), rate ? `${rate} per second` : "by key x"]), String(look.blink), (rate) => {
      look.blink = Number(rate);
      this.#startBlinking();
    });
    this.gain = select("Gain of error and change", GAINS.map((gain) => [String(gain), `× ${gain}`]), "1", (gain) => this.setGain(Number(gain)));
    this.gainLabel = el("label", { class: "labelled", "data-tip": "Brightens error and change in all pictures ([ and ])" }, "Gain ", this.gain);
    this.lens = button("lens", "Lens", () => this.setLens(!look.lens), { key: "g" });
    this.zoomed = button("reset", "Show the whole picture", () => this.resetZoom(), { key: "0" });
    this.percent = el("output", { class: "percent" }, "100 %");
    const copyLink = button("link", "Copy a link to this view", () => copyText(location.href.split("#")[0] + this.link(), copyLink), { key: "l" });
    this.copyLink = copyLink;
    this.full = button("full", "Full screen", () => this.toggleFull(), { key: "f" });
    return el(
      "div",
      { class: "toolbar", role: "toolbar", "aria-label": "View" },
      this.views,
      this.layers,
      this.gainLabel,
      this.pair,
      this.blinkRate,
      el(
        "span",
        { class: "end" },
        button("−", "Zoom out", () => this.zoomBy(1 / 1.5), { key: "−" }),
        this.percent,
        button("+", "Zoom in", () => this.zoomBy(1.5), { key: "+" }),
        this.zoomed,
        this.lens,
        copyLink,
        this.full,
      ),
    );
  }

  #transport() {
    this.playButton = button("play", "Play", () => this.toggle(), { class: "play" });
    this.scrubber = el("input", {
      type: "range",
      min: "0",
      max: "0",
      value: "0",
      "aria-label": "Frame",
      oninput: () => this.goTo(Number(this.scrubber.value)),
    });
    this.marks = el("div", { class: "marks" });
    this.number = el("input", {
      type: "number",
      min: "0",
      value: "0",
      "aria-label": "Frame number",
      onchange: () => {
        this.lookAt(this.number.valueAsNumber);
        this.number.value = String(this.frame); // of a number that no frame has
      },
    });
    this.total = el("span", {}, "/ 0");
    this.seconds = el("output", { class: "seconds" }, "0.000 s");
    this.speed = select("Speed", SPEEDS.map((speed) => [String(speed), `${speed}×`]), "1", (speed) => this.setSpeed(Number(speed)));
    this.loop = button("loop", "Loop", () => this.setLoop(!look.loop), { key: "r" });
    return (this.transport = el(
      "div",
      { class: "transport" },
      button("back", "Frame before", () => this.stepFrames(-1), { key: "←" }),
      this.playButton,
      button("forward", "Next frame", () => this.stepFrames(1), { key: "→" }),
      el("div", { class: "track" }, this.scrubber, this.marks),
      el("span", { class: "counter" }, this.number, this.total),
      this.seconds,
      this.speed,
      this.loop,
    ));
  }

  // nth: how many marks stand at this frame already.
  #mark({ name, metric, frame, value }, nth) {
    const at = this.clip.frames > 1 ? frame / (this.clip.frames - 1) : 0;
    const label = `Worst frame of ${name}: ${frame}, ${metric.label} ${format(value)}`;
    return el("button", {
      type: "button",
      "aria-label": label,
      "data-tip": `${label} (m)`,
      style: `--at:${at}; --nth:${nth}; color:${colourVariable(this.chapter, name)}`,
      onclick: () => this.lookAt(frame),
    });
  }

  #syncControls() {
    const { clip } = this;
    const names = clip ? this.#names() : [];
    const has = (layer) => clip?.panels.some((panel) => panel.layer === layer) ?? false;
    const paired = look.view === "wipe" || look.view === "blink";
    this.views.choose(look.view);
    this.views.show("panorama", this.video?.panorama ?? false);
    this.views.show("wipe", names.length > 1);
    this.views.show("blink", names.length > 1);
    this.layers.choose(Object.keys(look.layers).length ? null : look.layer);
    this.layers.show("error", has("error"));
    this.layers.show("change", has("change"));
    this.gain.value = String(look.gain);
    this.gainLabel.hidden = !this.#coloured().length;
    this.blinkRate.hidden = look.view !== "blink";
    this.pair.hidden = !paired;
    this.pair.replaceChildren();
    if (paired && clip) {
      const options = names.map((name) => [name, name]);
      const choose = (side) => select(side.toUpperCase(), options, look[side], (name) => this.setPair(side, name));
      this.pair.append("A ", choose("a"), button("swap", "Show the other", () => this.swap(), { key: "x" }), " B ", choose("b"));
    }
    press(this.lens, look.lens);
    this.lens.disabled = look.view === "panorama";
    press(this.loop, look.loop);
    this.speed.value = String(look.speed);
    this.transport.classList.toggle("still", !this.media?.moving);
    this.root.classList.toggle("empty", !clip);
  }

  setView(view) {
    look.view = view;
    this.#refresh();
  }

  setLayer(layer, name = null) {
    if (name === null) Object.assign(look, { layer, layers: {} });
    else look.layers[name] = layer;
    this.#refresh();
  }

  setPair(side, name) {
    look[side] = name;
    this.#refresh();
  }

  // Blinking: the other of the two. Wiping: they change sides.
  swap() {
    if (look.view === "blink") return this.#show(look.shown === "a" ? "b" : "a");
    [look.a, look.b] = [look.b, look.a];
    this.#refresh();
  }

  setGain(gain) {
    setGain(gain);
    this.gain.value = String(gain);
    this.#colourBars();
    this.changed();
  }

  setLens(on) {
    look.lens = on;
    press(this.lens, on);
    this.draw();
  }

  setSpeed(speed) {
    look.speed = speed;
    this.speed.value = String(speed);
    this.#applyPlayback();
  }

  setLoop(on) {
    look.loop = on;
    press(this.loop, on);
    this.#applyPlayback();
  }

  #applyPlayback() {
    if (!this.media?.moving) return;
    this.media.element.loop = look.loop;
    this.media.element.playbackRate = look.speed;
  }

  toggleFull() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.root.requestFullscreen?.().catch((error) => say(error.message));
  }

  toggle() {
    if (this.media?.playing) this.media.pause();
    else this.media?.play();
  }

  stepFrames(count) {
    if (!this.clip) return;
    const last = this.clip.frames - 1;
    this.media.pause();
    const next = this.frame + count;
    const wraps = look.loop && Math.abs(count) === 1;
    this.goTo(wraps && next > last ? 0 : wraps && next < 0 ? last : next);
  }

  goTo(frame) {
    if (!this.clip || !Number.isFinite(frame)) return;
    this.media.show(frame);
    this.frame = this.media.frame;
    this.#showNumber();
    this.changed();
  }

  // Stops at a frame, to look at it.
  lookAt(frame) {
    this.media?.pause();
    this.goTo(frame);
  }

  nextWorst() {
    const frames = [...new Set((this.worst ?? []).map(({ frame }) => frame))].sort((left, right) => left - right);
    if (frames.length) this.lookAt(frames.find((frame) => frame > this.frame) ?? frames[0]);
  }

  #refresh() {
    if (this.clip) this.build();
    else this.#syncControls();
    this.changed();
  }

  // ---- Pictures

  #names() {
    return [...new Set(this.clip.panels.map((panel) => panel.of))];
  }

  #panel(name, layer) {
    return this.clip.panels.find((panel) => panel.of === name && panel.layer === layer);
  }

  // The layer that a picture shows: the original has no error, other pictures have neither.
  #layerOf(name) {
    const layer = look.layers[name] ?? look.layer;
    return this.#panel(name, layer) ? layer : "picture";
  }

  #coloured() {
    if (!this.clip) return [];
    const shown = this.slots.map((slot) => this.#layerOf(slot.of));
    return ["error", "change"].filter((layer) => shown.includes(layer));
  }

  // Builds the stage for the view that is chosen.
  build() {
    clearInterval(this.timer);
    this.#closeSlots();
    const paired = look.view === "wipe" || look.view === "blink";
    const groups = paired ? [[look.a, look.b]] : this.#names().map((name) => [name]);
    this.figures = groups.map((names) => this.#figure(names));
    this.stage.className = `stage ${look.view}`;
    this.stage.replaceChildren(...this.figures);
    this.#syncControls();
    this.#fit();
    this.#applyZoom();
    this.#colourBars();
    if (look.view === "wipe") this.#applyWipe();
    if (look.view === "blink") this.#startBlinking();
    if (look.view === "panorama") this.#openPanoramas();
    this.draw();
    this.#showNumber();
  }

  // One picture, or two at the same place.
  #figure(names) {
    const viewport = el("div", { class: "viewport" });
    const slots = names.map((name, index) => this.#slot(name, names.length > 1 ? "ab"[index] : ""));
    viewport.append(...slots.map((slot) => slot.sheet));
    if (look.view === "wipe") viewport.append(this.#divider());
    this.slots.push(...slots);
    const heads = names.map((name) =>
      el("span", { class: "head" }, swatch(this.chapter, name), el("b", { title: name }, name), this.#layerChoice(name)),
    );
    const feet = slots.map((slot) => slot.scores);
    return el("figure", { class: "picture" }, el("figcaption", { class: "heads" }, heads), viewport, el("div", { class: "feet" }, feet));
  }

  #slot(name, side) {
    const canvas = el("canvas", { class: "frame", "data-of": name, role: "img", "aria-label": name });
    const lens = el("div", { class: "lens", "aria-hidden": "true", hidden: true }, el("canvas"));
    const sheet = el("div", { class: `sheet ${side}` }, canvas, lens);
    const curves = this.clip.curves?.[name] ?? {};
    const outputs = Object.entries(curves).map(([metric, values]) => {
      const about = metricOf(this.chapter, metric);
      const value = el("b", {});
      const text = el("span", { class: "score", "data-tip": explain(about) || null }, about.label, " ", value);
      return { text, value, values };
    });
    const scores = el("div", { class: "scores" }, outputs.map(({ text }) => text));
    return { of: name, side, sheet, canvas, lens, context: canvas.getContext("2d"), scores, outputs };
  }

  #layerChoice(name) {
    const options = Object.entries(LAYERS).filter(([layer]) => this.#panel(name, layer));
    if (options.length < 2) return null;
    return select(`Layer of ${name}`, options, this.#layerOf(name), (layer) => this.setLayer(layer, name));
  }

  #divider() {
    this.dividerBar = el("div", {
      class: "divider",
      role: "slider",
      tabindex: "0",
      "aria-label": "Where A ends and B starts",
      "aria-valuemin": "0",
      "aria-valuemax": "100",
      onkeydown: (event) => {
        const by = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
        if (!by) return;
        event.preventDefault();
        event.stopPropagation();
        this.setWipe(look.wipe + by);
      },
    });
    return this.dividerBar;
  }

  draw() {
    if (!this.clip) return;
    if (this.media.copies && this.media.playing) return void this.#drawCopies();
    const source = this.media.element;
    for (const slot of this.slots) {
      const panel = this.#panel(slot.of, this.#layerOf(slot.of));
      const { x, y, width, height } = panel;
      this.#drawSlot(slot, panel, (context) => context.drawImage(source, x, y, width, height, 0, 0, width, height));
    }
  }

  // A frame that comes while another is copied is left out: it plays on.
  async #drawCopies() {
    if (this.copying) return;
    const { media, slots } = this;
    const panels = slots.map((slot) => this.#panel(slot.of, this.#layerOf(slot.of)));
    this.copying = true;
    const copies = await media.copy(panels);
    this.copying = false;
    if (slots !== this.slots || !media.playing || !copies) return this.draw();
    slots.forEach((slot, index) => this.#drawSlot(slot, panels[index], (context) => context.putImageData(copies[index], 0, 0)));
  }

  #drawSlot(slot, panel, put) {
    const { canvas, context, sheet } = slot;
    if (canvas.width !== panel.width || canvas.height !== panel.height) {
      canvas.width = panel.width;
      canvas.height = panel.height;
    }
    sheet.dataset.layer = panel.layer;
    put(context);
    this.#drawLens(slot);
    slot.panorama?.draw(look.direction);
  }

  #drawLens({ canvas, lens }) {
    lens.hidden = !look.lens || look.view === "panorama";
    if (lens.hidden) return;
    const box = this.#box();
    const size = Math.round(clamp(box.width * 0.36, 90, 220));
    const pixels = Math.round(size * devicePixelRatio);
    const glass = lens.firstChild;
    if (glass.width !== pixels) glass.width = glass.height = pixels;
    const shown = size / ((box.width / canvas.width) * look.zoom.k * LENS_FACTOR); // pixels of the picture, per side
    const { x, y } = look.lensAt;
    const context = glass.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.fillRect(0, 0, pixels, pixels);
    context.drawImage(canvas, x * canvas.width - shown / 2, y * canvas.height - shown / 2, shown, shown, 0, 0, pixels, pixels);
    lens.style.width = lens.style.height = `${size}px`;
    lens.style.left = `${((x - look.zoom.x) * look.zoom.k + 0.5) * box.width - size / 2}px`;
    lens.style.top = `${((y - look.zoom.y) * look.zoom.k + 0.5) * box.height - size / 2}px`;
  }

  #box() {
    const viewport = this.stage.querySelector(".viewport");
    return viewport ? viewport.getBoundingClientRect() : { width: 1, height: 1, left: 0, top: 0 };
  }

  #showFrame(frame) {
    const moved = frame !== this.frame;
    this.frame = frame;
    this.draw();
    if (moved) this.#showNumber();
  }

  #showNumber() {
    const { frame, clip } = this;
    if (!clip) return;
    this.scrubber.value = String(frame);
    this.scrubber.style.setProperty("--at", clip.frames > 1 ? frame / (clip.frames - 1) : 0);
    if (document.activeElement !== this.number) this.number.value = String(frame);
    const seconds = clip.fps ? `${(frame / clip.fps).toFixed(3)} s` : "";
    this.seconds.textContent = seconds;
    this.scrubber.setAttribute("aria-valuetext", `Frame ${frame}, ${seconds}`);
    for (const slot of this.slots) {
      for (const { value, values } of slot.outputs) value.textContent = format(values[frame] ?? null);
    }
    this.chart.show(frame);
  }

  #showPlaying(playing) {
    const label = playing ? "Pause" : "Play";
    this.playButton.replaceChildren(icon(playing ? "pause" : "play"));
    this.playButton.setAttribute("aria-label", label);
    this.playButton.dataset.tip = `${label} (space)`;
    this.root.classList.toggle("playing", playing);
    if (!playing) this.changed();
  }

  // As many columns as make the pictures largest, in the space that there is.
  #fit() {
    if (!this.clip || !this.figures?.length) return;
    const { width, height } = this.clip.panels[0];
    const aspect = look.view === "panorama" ? 16 / 10 : width / height;
    const gap = 10;
    const feet = this.slots.some((slot) => slot.outputs.length) ? 28 : 4;
    const extra = 34 + feet;
    const across = this.stage.clientWidth;
    const down = document.fullscreenElement === this.root ? innerHeight - 190 : Math.max(innerHeight * 0.66, 320);
    const count = this.figures.length;
    let best = { size: 0, columns: 1 };
    for (let columns = 1; columns <= count; columns++) {
      const rows = Math.ceil(count / columns);
      const wide = (across - gap * (columns - 1)) / columns;
      const high = (down - gap * (rows - 1)) / rows - extra;
      const size = Math.min(wide, high * aspect);
      if (size > best.size) best = { size, columns };
    }
    // On a narrow screen one column that scrolls shows more than pictures that all fit.
    if (across < 500 && count <= 3) best = { size: across, columns: 1 };
    const enlarged = look.view === "panorama" ? Infinity : width * MAX_ENLARGED;
    const size = Math.floor(clamp(best.size, Math.min(150, across), enlarged));
    const columns = Math.min(best.columns, Math.max(1, Math.floor((across + gap) / (size + gap)))); // of many small ones
    this.stage.style.setProperty("--columns", columns);
    this.stage.style.setProperty("--size", `${size}px`);
    this.stage.style.setProperty("--aspect", aspect);
    this.#applyZoom();
    if (look.lens) this.draw();
  }

  // ---- Zoom, lens, wipe, blink

  #applyZoom() {
    const { zoom } = look;
    zoom.k = clamp(zoom.k, 1, MAX_ZOOM);
    const margin = 0.5 / zoom.k;
    zoom.x = clamp(zoom.x, margin, 1 - margin);
    zoom.y = clamp(zoom.y, margin, 1 - margin);
    const { style, classList } = this.stage;
    style.setProperty("--k", zoom.k);
    style.setProperty("--tx", `${(0.5 - zoom.x * zoom.k) * 100}%`);
    style.setProperty("--ty", `${(0.5 - zoom.y * zoom.k) * 100}%`);
    classList.toggle("zoomed", zoom.k > 1);
    const scale = this.clip ? (this.#box().width * zoom.k) / this.clip.panels[0].width : 1;
    classList.toggle("sharp", scale >= SHARP_FROM);
    this.percent.textContent = look.view === "panorama" ? `${Math.round(look.direction.field)}°` : `${Math.round(scale * 100)} %`;
  }

  // at: the place, in the picture and in the viewport, that stays where it is.
  zoomBy(factor, at = { x: look.zoom.x, y: look.zoom.y, u: 0.5, v: 0.5 }) {
    if (look.view === "panorama") {
      look.direction.field = clamp(look.direction.field / factor, 20, 120);
    } else {
      const k = clamp(look.zoom.k * factor, 1, MAX_ZOOM);
      look.zoom = { k, x: at.x - (at.u - 0.5) / k, y: at.y - (at.v - 0.5) / k };
    }
    this.#moved();
  }

  panBy(u, v) {
    if (look.view === "panorama") {
      const { direction } = look;
      direction.yaw = ((direction.yaw + u * direction.field + 540) % 360) - 180;
      direction.pitch = clamp(direction.pitch - v * direction.field * 0.6, -90, 90);
    } else {
      look.zoom.x += u / look.zoom.k;
      look.zoom.y += v / look.zoom.k;
    }
    this.#moved();
  }

  resetZoom() {
    look.zoom = { k: 1, x: 0.5, y: 0.5 };
    look.direction = { yaw: 0, pitch: 0, field: 90 };
    this.#moved();
  }

  #moved() {
    this.#applyZoom();
    if (look.lens || look.view === "panorama") this.draw();
    this.changed();
  }

  moveLens(x, y) {
    look.lensAt = { x: clamp(x, 0, 1), y: clamp(y, 0, 1) };
    if (look.lens && this.clip) this.slots.forEach((slot) => this.#drawLens(slot));
  }

  setWipe(part) {
    look.wipe = clamp(part, 0, 1);
    this.#applyWipe();
    this.changed();
  }

  #applyWipe() {
    this.stage.style.setProperty("--wipe", look.wipe);
    this.dividerBar.setAttribute("aria-valuenow", String(Math.round(look.wipe * 100)));
  }

  #startBlinking() {
    clearInterval(this.timer);
    this.#show(look.shown);
    if (look.blink) this.timer = setInterval(() => this.#show(look.shown === "a" ? "b" : "a"), 1000 / look.blink);
  }

  #show(side) {
    look.shown = side;
    this.stage.dataset.shown = side;
  }

  #openPanoramas() {
    for (const slot of this.slots) {
      const host = el("div", { class: "sphere", role: "img", "aria-label": `${slot.of}, from inside` });
      slot.sheet.append(host);
      this.#sizeCanvas(slot);
      try {
        slot.panorama = new PanoramaView(host, slot.canvas);
      } catch (error) {
        host.replaceChildren(el("p", { class: "missing", role: "alert" }, error.message));
      }
    }
  }

  #sizeCanvas(slot) {
    const panel = this.#panel(slot.of, this.#layerOf(slot.of));
    slot.canvas.width = panel.width;
    slot.canvas.height = panel.height;
  }

  // Browsers keep canvases that nothing refers to any more for long: their pixels are freed here.
  #closeSlots() {
    for (const { panorama, canvas, lens } of this.slots) {
      panorama?.close();
      canvas.width = lens.firstChild.width = 0;
    }
    this.slots = [];
  }

  // ---- Numbers

  #colourBars() {
    if (!this.clip) return;
    this.gainLabel.hidden = !this.#coloured().length;
    const most = this.clip.scale / look.gain;
    this.bars.replaceChildren(
      ...this.#coloured().map((layer) => {
        const colours = MAPS[layer].split(" ").map((hex) => `#${hex}`);
        const ticks = [0, 0.5, 1].map((part) => el("span", {}, part === 1 ? `≥ ${format(most)}` : part ? format(most * part) : "0"));
        return el(
          "div",
          { class: "bar", "data-tip": `${MEANINGS[layer]}, of pixels from 0 to 1; ${format(most)} is ${format(most * 255)} of 255.` },
          el("span", { class: "bar-name" }, LAYERS[layer]),
          el("div", {}, el("div", { class: "ramp", style: `background:linear-gradient(to right, ${colours})` }), el("div", { class: "ticks" }, ticks)),
        );
      }),
    );
  }

  // The values of one pixel of all pictures.
  #readPixel({ x, y }) {
    if (!this.clip) return;
    const names = this.#names();
    const read = [];
    for (const name of names) {
      const layers = ["picture", "error"].filter((layer) => this.#panel(name, layer));
      read.push(...layers.map((layer) => ({ name, layer, panel: this.#panel(name, layer) })));
    }
    const { probe } = this;
    probe.canvas.width = read.length;
    probe.imageSmoothingEnabled = false;
    read.forEach(({ panel }, index) => {
      const left = panel.x + Math.min(Math.floor(x * panel.width), panel.width - 1);
      const top = panel.y + Math.min(Math.floor(y * panel.height), panel.height - 1);
      probe.drawImage(this.media.element, left, top, 1, 1, index, 0, 1, 1);
    });
    const { data } = probe.getImageData(0, 0, read.length, 1);
    const [height, width] = this.clip.source;
    this.pixel.replaceChildren(el("span", {}, `x ${Math.floor(x * width)}, y ${Math.floor(y * height)}`));
    names.forEach((name) => {
      const parts = read.flatMap((one, index) => {
        if (one.name !== name) return [];
        const [r, g, b] = data.slice(4 * index, 4 * index + 3);
        return one.layer === "picture" ? [`${r} ${g} ${b}`] : [`error ${(((r + g + b) / 3 / 255) * this.clip.scale).toFixed(3)}`];
      });
      this.pixel.append(el("span", {}, swatch(this.chapter, name), parts.join(" · ")));
    });
  }

  // ---- Pointer and keys

  #listen() {
    const { stage } = this;
    stage.addEventListener("pointerdown", (event) => this.#pointerDown(event));
    stage.addEventListener("pointermove", (event) => this.#pointerMove(event));
    for (const type of ["pointerup", "pointercancel"]) stage.addEventListener(type, (event) => this.#pointerUp(event));
    stage.addEventListener("pointerleave", () => this.pixel.replaceChildren());
    // Wheels scroll the page, too: they zoom when the pictures were clicked or focused, or with Ctrl.
    stage.addEventListener(
      "wheel",
      (event) => {
        const at = this.#place(event);
        if (!at || !(event.ctrlKey || event.metaKey || stage.contains(document.activeElement))) return;
        event.preventDefault();
        this.zoomBy(Math.exp(-clamp(event.deltaY, -120, 120) / 300), at);
      },
      { passive: false },
    );
    this.root.addEventListener("fullscreenchange", () => this.#fit());
  }

  // Where an event is: u, v in its viewport and x, y in the picture, in [0, 1].
  #place(event) {
    const viewport = event.target.closest?.(".viewport");
    return viewport && this.clip ? this.#placeIn(viewport, event) : null;
  }

  #placeIn(viewport, event) {
    const box = viewport.getBoundingClientRect();
    const u = (event.clientX - box.left) / box.width;
    const v = (event.clientY - box.top) / box.height;
    return { u, v, x: look.zoom.x + (u - 0.5) / look.zoom.k, y: look.zoom.y + (v - 0.5) / look.zoom.k, box };
  }

  #pointerDown(event) {
    const viewport = event.target.closest(".viewport");
    if (!viewport || !this.clip || event.button > 0) return;
    const wiping = look.view === "wipe" && (look.zoom.k === 1 || event.target.closest(".divider"));
    this.pointers.set(event.pointerId, { viewport, x: event.clientX, y: event.clientY, moved: 0, wiping });
    viewport.setPointerCapture(event.pointerId);
    if (wiping) this.setWipe(this.#placeIn(viewport, event).u);
  }

  #pointerMove(event) {
    const held = this.pointers.get(event.pointerId);
    if (!held) {
      const place = this.#place(event);
      if (!place || look.view === "panorama") return;
      this.moveLens(place.x, place.y);
      if (!this.reading) {
        this.reading = requestAnimationFrame(() => {
          this.reading = 0;
          this.#readPixel(place);
        });
      }
      return;
    }
    const place = this.#placeIn(held.viewport, event);
    const [dx, dy] = [event.clientX - held.x, event.clientY - held.y];
    const other = [...this.pointers.values()].find((one) => one !== held);
    if (other) {
      const span = (x, y) => Math.hypot(x - other.x, y - other.y) || 1;
      this.zoomBy(span(event.clientX, event.clientY) / span(held.x, held.y), place);
    } else if (held.wiping) {
      this.setWipe(place.u);
    } else {
      this.panBy(-dx / place.box.width, -dy / place.box.height);
    }
    Object.assign(held, { x: event.clientX, y: event.clientY, moved: held.moved + Math.hypot(dx, dy) });
    this.moveLens(place.x, place.y);
  }

  #pointerUp(event) {
    const held = this.pointers.get(event.pointerId);
    this.pointers.delete(event.pointerId);
    if (!held || held.moved >= 4 || event.type !== "pointerup") return;
    if (look.view === "blink") this.swap();
    // Browsers do not agree on dblclick of pictures that hold the pointer, or of fingers.
    if (event.timeStamp - this.tapped < DOUBLE_TAP) this.resetZoom();
    this.tapped = event.timeStamp;
  }

  // Keys, as the help names them. Returns whether the key is one of the player's.
  key(event) {
    if (!this.clip && !["f"].includes(event.key)) return false;
    const pan = (u, v) => {
      if (look.lens && look.view !== "panorama") this.moveLens(look.lensAt.x + u * 0.2, look.lensAt.y + v * 0.2);
      else this.panBy(u, v);
    };
    const faster = (by) => this.setSpeed(SPEEDS[clamp(SPEEDS.indexOf(look.speed) + by, 0, SPEEDS.length - 1)]);
    const brighter = (by) => this.setGain(GAINS[clamp(GAINS.indexOf(look.gain) + by, 0, GAINS.length - 1)]);
    const layer = (name) => this.setLayer(look.layer === name && !Object.keys(look.layers).length ? "picture" : name);
    const view = (name) => this.setView(name);
    const actions = {
      " ": () => this.toggle(),
      ArrowLeft: () => this.stepFrames(event.shiftKey ? -10 : -1),
      ArrowRight: () => this.stepFrames(event.shiftKey ? 10 : 1),
      Home: () => this.lookAt(0),
      End: () => this.lookAt(this.clip.frames - 1),
      1: () => view("grid"),
      2: () => this.#names().length > 1 && view("wipe"),
      3: () => this.#names().length > 1 && view("blink"),
      4: () => this.video.panorama && view("panorama"),
      o: () => this.setLayer("picture"),
      e: () => layer("error"),
      c: () => layer("change"),
      x: () => (look.view === "wipe" || look.view === "blink") && this.swap(),
      "+": () => this.zoomBy(1.5),
      "=": () => this.zoomBy(1.5),
      "-": () => this.zoomBy(1 / 1.5),
      0: () => this.resetZoom(),
      w: () => pan(0, -0.1),
      s: () => pan(0, 0.1),
      a: () => pan(-0.1, 0),
      d: () => pan(0.1, 0),
      g: () => this.setLens(!look.lens),
      "[": () => brighter(-1),
      "]": () => brighter(1),
      ",": () => faster(-1),
      ".": () => faster(1),
      r: () => this.setLoop(!look.loop),
      m: () => this.nextWorst(),
      l: () => this.copyLink.click(),
      f: () => this.toggleFull(),
    };
    const action = actions[event.key];
    if (action) action();
    return Boolean(action);
  }

  // ---- Links

  // The part of an address that opens this view.
  link() {
    if (!this.video) return "";
    const { zoom, direction } = look;
    const parts = { video: this.video.id, frame: this.frame, view: look.view };
    if (look.layer !== "picture") Object.assign(parts, { layer: look.layer, gain: look.gain });
    if (look.view === "wipe" || look.view === "blink") Object.assign(parts, { a: look.a, b: look.b });
    if (look.view === "wipe") parts.wipe = look.wipe.toFixed(3);
    if (look.view === "panorama") parts.turn = [direction.yaw, direction.pitch, direction.field].map((one) => one.toFixed(1)).join(",");
    else if (zoom.k > 1) parts.zoom = [zoom.k, zoom.x, zoom.y].map((one) => one.toFixed(4)).join(",");
    return `#${new URLSearchParams(parts)}`;
  }
}

// Takes over what a link says of the view. Whatever it does not say, or says wrongly, stays as it is.
function readLook(parts) {
  const one = (key, allowed) => (allowed.includes(parts.get(key)) ? parts.get(key) : null);
  const numbers = (key, count) => {
    const found = (parts.get(key) ?? "").split(",").map(Number);
    return found.length === count && found.every(Number.isFinite) && parts.get(key) ? found : null;
  };
  look.view = one("view", ["grid", "wipe", "blink", "panorama"]) ?? look.view;
  look.layer = one("layer", Object.keys(LAYERS)) ?? "picture";
  look.layers = {};
  look.a = parts.get("a") ?? look.a;
  look.b = parts.get("b") ?? look.b;
  const gain = Number(parts.get("gain"));
  if (GAINS.includes(gain)) setGain(gain);
  const wipe = numbers("wipe", 1);
  if (wipe) look.wipe = clamp(wipe[0], 0, 1);
  const zoom = numbers("zoom", 3);
  look.zoom = zoom ? { k: clamp(zoom[0], 1, MAX_ZOOM), x: zoom[1], y: zoom[2] } : { k: 1, x: 0.5, y: 0.5 };
  const turn = numbers("turn", 3);
  if (turn) look.direction = { yaw: turn[0], pitch: clamp(turn[1], -90, 90), field: clamp(turn[2], 20, 120) };
}
