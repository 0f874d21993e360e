// Loads a clip and its media: one video file that holds all pictures of all frames side by side.
"use strict";

const waiting = new Map(); // id of a clip -> resolve

// Called by index_clips/ID.js: scripts, since a page from disk may not read JSON beside it.
function vae3dClip(clip) {
  waiting.get(clip.id)?.(clip);
}

function loadClip(id) {
  for (const inlined of document.querySelectorAll("script.clip")) {
    if (inlined.dataset.id === id) return Promise.resolve().then(() => JSON.parse(inlined.textContent));
  }
  const path = `index_clips/${encodeURIComponent(id)}.js`;
  return new Promise((resolve, reject) => {
    const script = el("script", { src: path });
    const close = () => {
      waiting.delete(id);
      script.remove(); // its text holds the media once more
    };
    waiting.set(id, (clip) => {
      close();
      resolve(clip);
    });
    script.onerror = () => {
      close();
      reject(new Error(`${path} is missing: it belongs beside this page.`));
    };
    script.onload = () => {
      if (!waiting.has(id)) return;
      close();
      reject(new Error(`${path} is damaged.`));
    };
    document.head.append(script);
  });
}

function blobOf(dataUrl) {
  const comma = dataUrl.indexOf(",");
  const type = dataUrl.slice(5, dataUrl.indexOf(";"));
  const text = atob(dataUrl.slice(comma + 1));
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < bytes.length; index++) bytes[index] = text.charCodeAt(index);
  return new Blob([bytes], { type });
}

async function copyOf(frame, { x, y, width, height }) {
  const rect = { x, y, width: width + (width % 2), height: height + (height % 2) }; // of whole pixels of colour
  const data = new Uint8ClampedArray(4 * rect.width * rect.height);
  const options = { rect, format: "RGBA" };
  if (frame.allocationSize(options) !== data.length) throw new Error("This browser copies in the format of the file only.");
  await frame.copyTo(data, options);
  return new ImageData(data, rect.width, rect.height);
}

// Whether pixels of a video that plays are copied. Chromium without a GPU keeps what drawImage took from each frame, up to
// some 600 MB, until memory gets short. On a GPU copies would be slow.
let copies;

function copiesPixels() {
  if (typeof VideoFrame !== "function") return false;
  const gl = el("canvas").getContext("webgl");
  const name = gl?.getExtension("WEBGL_debug_renderer_info")?.UNMASKED_RENDERER_WEBGL;
  const renderer = name ? gl.getParameter(name) : "";
  gl?.getExtension("WEBGL_lose_context")?.loseContext();
  return !gl || /swiftshader|llvmpipe/i.test(renderer);
}

// The frames of an opened clip. onframe(frame) is called when a frame can be drawn, onplay(playing) when it starts or
// stops.
class Media {
  constructor(clip, { onframe, onplay }) {
    this.fps = clip.fps;
    this.frames = clip.frames;
    this.frame = 0;
    this.onframe = onframe;
    this.onplay = onplay;
    this.moving = clip.media.startsWith("data:video/") && clip.frames > 1;
    const blob = blobOf(clip.media); // a blob of this page: its pixels may be read
    clip.media = null; // it is as large, once more
    this.url = URL.createObjectURL(blob);
    this.element = el(blob.type.startsWith("video/") ? "video" : "img", { alt: "" });
  }

  // Resolves when the first frame can be drawn; rejects if the browser cannot play it.
  open() {
    const media = this.element;
    const still = media.tagName === "IMG";
    return new Promise((resolve, reject) => {
      media.onerror = () => reject(new Error("The browser cannot play this clip: its file is damaged, or H.264 is missing."));
      media.addEventListener(still ? "load" : "loadeddata", resolve, { once: true });
      if (!still) {
        Object.assign(media, { muted: true, playsInline: true, preload: "auto", loop: true });
        media.addEventListener("seeked", () => this.#seeked());
        media.addEventListener("play", () => this.onplay(true));
        media.addEventListener("pause", () => this.#paused());
        media.addEventListener("ended", () => this.#paused());
      }
      media.src = this.url;
    }).then(() => {
      if (this.moving) this.#watch();
    });
  }

  close() {
    this.closed = true;
    if (this.moving) this.element.pause();
    this.element.onerror = null;
    this.element.removeAttribute("src");
    if (this.element.load) this.element.load(); // frees the decoder
    URL.revokeObjectURL(this.url);
  }

  get playing() {
    return this.moving && !this.element.paused && !this.element.ended;
  }

  // The pixels of panels of the frame that is there, as ImageData; null where the browser cannot copy them, which
  // `copies` then says, too. They may be wider and higher by one.
  async copy(panels) {
    try {
      const frame = new VideoFrame(this.element);
      try {
        return await Promise.all(panels.map((panel) => copyOf(frame, panel)));
      } finally {
        frame.close();
      }
    } catch {
      this.copies = false;
      return null;
    }
  }

  play() {
    if (!this.moving) return;
    this.copies ??= copies ??= copiesPixels();
    // A pause that comes before the first frame rejects the promise.
    this.element.play().catch((error) => error.name === "AbortError" || say(`Cannot play: ${error.message}`));
  }

  pause() {
    if (this.moving) this.element.pause();
  }

  // Frame t is shown from t / fps on: its middle is far from both neighbours. A seek under way is let finish, so that a
  // held key shows frames instead of starting ever new seeks.
  show(frame) {
    this.frame = this.wanted = clamp(Math.round(frame), 0, this.frames - 1);
    if (this.moving && !this.element.seeking) this.#seek();
    else if (!this.moving) this.onframe(this.frame);
  }

  #seek() {
    this.sought = this.wanted;
    this.element.currentTime = (this.sought + 0.5) / this.fps;
  }

  #seeked() {
    if (this.closed || this.wanted === undefined) return; // a loop that starts again seeks, too
    if (this.sought !== this.wanted) return this.#seek();
    if (this.playing) this.wanted = undefined;
    this.onframe(this.frame);
  }

  #paused() {
    if (this.closed) return;
    this.onplay(false);
    this.show(this.frame); // from somewhere in the frame to its middle
  }

  // Follows the frames that the browser presents, also those of a seek that come after the event.
  #watch() {
    const presented = (mediaTime) => {
      if (this.closed) return;
      if (this.playing && !this.element.seeking) this.frame = clamp(Math.round(mediaTime * this.fps), 0, this.frames - 1);
      this.onframe(this.frame);
    };
    if (this.element.requestVideoFrameCallback) {
      const next = (now, { mediaTime }) => {
        presented(mediaTime);
        if (!this.closed) this.element.requestVideoFrameCallback(next);
      };
      this.element.requestVideoFrameCallback(next);
      return;
    }
    const tick = () => {
      if (this.closed) return;
      if (this.playing) presented(Math.floor(this.element.currentTime * this.fps) / this.fps);
      requestAnimationFrame(tick);
    };
    tick();
  }
}
