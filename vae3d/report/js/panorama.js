// Views from inside a panorama, drawn by pannellum's renderer. Its viewer would bring own controls for each panel; here
// all panels turn together.
"use strict";

// Draws what `canvas` shows, an equirectangular picture, in `host`. Throws an Error if the browser cannot.
class PanoramaView {
  constructor(host, canvas) {
    this.host = host;
    this.renderer = libpannellum.renderer(host);
    const turn = 2 * Math.PI;
    try {
      this.renderer.init(canvas, "equirectangular", true, turn, Math.PI, 0, () => {}, {});
    } catch (error) {
      const known = { "no webgl": "WebGL is off in this browser", "webgl size error": "The panorama is too large for WebGL here" };
      throw new Error(known[error.type] ?? String(error.message ?? error.type));
    }
    this.observer = new ResizeObserver(() => {
      this.renderer.resize();
      if (this.direction) this.draw(this.direction);
    });
    this.observer.observe(host);
  }

  // direction: yaw, pitch and horizontal field of view in degrees.
  draw(direction) {
    this.direction = direction;
    const radians = (degrees) => (degrees * Math.PI) / 180;
    this.renderer.render(radians(direction.pitch), radians(direction.yaw), radians(direction.field), {});
  }

  close() {
    this.observer.disconnect();
    this.renderer.destroy();
  }
}
