// Elements, icons, tooltips, copying: what all other files build with.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const OPEN_WARNINGS = 3;

// An element with attributes (listeners are functions: onclick) and children. Strings become text, never HTML: names of
// files and metrics are any text.
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Markup that Python escaped: Report.text, Chapter.text, Picture.html. Nothing else of the data may come here.
function html(tag, attributes, markup) {
  const element = el(tag, attributes);
  element.innerHTML = markup;
  return element;
}

const ICONS = {
  play: "M7 5v14l12-7z",
  pause: "M7 5h3.5v14H7zM13.5 5H17v14h-3.5z",
  back: "M15.5 5v14L6 12zM4 5h2v14H4z",
  forward: "M8.5 5v14l9.5-7zM18 5h2v14h-2z",
  up: "M12 7l7 9H5z",
  down: "M12 17l7-9H5z",
  left: "M15.5 4.5L8 12l7.5 7.5",
  right: "M8.5 4.5L16 12l-7.5 7.5",
  loop: "M17 4l3 3-3 3M4 12V9a2 2 0 012-2h14M7 20l-3-3 3-3M20 12v3a2 2 0 01-2 2H4",
  link: "M10 14a4 4 0 005.7 0l3-3A4 4 0 0013 5.300l-1 1M14 10a4 4 0 00-5.700 0l-3 3a4 4 0 005.700 5.700l1-1",
  copy: "M9 9h10v11H9zM15 9V5H5v11h4",
  full: "M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5",
  lens: "M10.500 4a6.500 6.500 0 100 13 6.500 6.500 0 000-13zM15.300 15.300L20 20",
  theme: "M12 3a9 9 0 100 18zM12 3a9 9 0 010 18",
  swap: "M7 4L3 8l4 4M3 8h14M17 12l4 4-4 4M21 16H7",
  reset: "M4 4v6h6M4.500 10a8 8 0 111 6.500",
};
const FILLED = new Set(["play", "pause", "back", "forward", "up", "down"]);

function icon(name) {
  const shape = svg("path", { d: ICONS[name] });
  return svg("svg", { viewBox: "0 0 24 24", class: FILLED.has(name) ? "icon filled" : "icon", "aria-hidden": "true" }, shape);
}

// A button that shows an icon or text; `label` is its accessible name and its tooltip, `key` the key that does the same.
function button(content, label, onclick, { key = "", ...attributes } = {}) {
  const shown = ICONS[content] ? icon(content) : content;
  const tip = key ? `${label} (${key})` : label;
  const own = { type: "button", "aria-label": label, "data-tip": tip, onclick, ...attributes };
  if (ICONS[content]) own.class = `icon-button ${attributes.class ?? ""}`.trim();
  return el("button", own, shown);
}

function press(element, pressed) {
  element.setAttribute("aria-pressed", String(pressed));
}

// Buttons of which one is pressed. options: value -> [text, key]. Returns the element, with `.choose(value)`.
function choice(label, options, onchoose) {
  const group = el("div", { class: "choice", role: "group", "aria-label": label });
  const buttons = new Map();
  for (const [value, [text, key]] of Object.entries(options)) {
    const one = el("button", { type: "button", "data-tip": `${text} (${key})`, onclick: () => onchoose(value) }, text);
    buttons.set(value, one);
    group.append(one);
  }
  group.choose = (chosen) => buttons.forEach((one, value) => press(one, value === chosen));
  group.show = (value, shown) => (buttons.get(value).hidden = !shown);
  return group;
}

// A <select>. options: [value, text] pairs, or [group label, pairs].
function select(label, options, chosen, onchange) {
  const option = ([value, text]) => el("option", { value, selected: value === chosen }, text);
  const items = options.map(([value, text]) =>
    Array.isArray(text) ? el("optgroup", { label: value }, text.map(option)) : option([value, text]),
  );
  return el("select", { "aria-label": label, onchange: (event) => onchange(event.target.value) }, items);
}

async function copyText(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers offer no clipboard to some pages from disk.
    const area = el("textarea", { class: "hidden-input", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say("Copied");
  from.classList.add("done");
  setTimeout(() => from.classList.remove("done"), 1200);
}

// A message to everyone: shown for a moment, and read by screen readers.
function say(text) {
  let toast = document.getElementById("toast");
  if (!toast) document.body.append((toast = el("div", { id: "toast", role: "status" })));
  toast.textContent = text;
  toast.classList.add("shown");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => toast.classList.remove("shown"), 1600);
}

function commands(text) {
  const copy = button("copy", "Copy the commands", () => copyText(text, copy), { class: "quiet" });
  return el("div", { class: "commands" }, el("pre", { tabindex: "0" }, text), copy);
}

// Many are folded: what the page is about comes first.
function warnings(texts) {
  const shown = texts.map((text) => el("p", { class: "warning" }, text));
  if (shown.length <= OPEN_WARNINGS) return shown;
  return [el("details", { class: "warnings" }, el("summary", { class: "warning" }, `${shown.length} warnings`), shown)];
}

// A path beside the page, of any file name; or an address of the web.
function href(path) {
  if (/^https?:\/\//.test(path)) return path;
  const encoded = path.split("/").map(encodeURIComponent).join("/");
  return encoded.startsWith("/") ? encoded : `./${encoded}`;
}

function links(items) {
  return Object.entries(items).map(([label, path]) => el("a", { href: href(path) }, label));
}

// Calls back once, when the element is about to be seen.
function whenSeen(element, callback) {
  const observer = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      callback();
    },
    { rootMargin: "300px" },
  );
  observer.observe(element);
}

// One tooltip for all elements with data-tip, by pointer and by keyboard. `title` is neither styled nor shown on focus.
function installTooltips() {
  const tip = el("div", { id: "tip", role: "tooltip" });
  document.body.append(tip);
  let timer = 0;
  const hide = () => {
    clearTimeout(timer);
    tip.classList.remove("shown");
  };
  const show = (target) => {
    tip.textContent = target.dataset.tip;
    const box = target.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
    tip.classList.add("shown");
  };
  const enter = (event) => {
    const target = event.target.closest?.("[data-tip]");
    hide();
    if (target) timer = setTimeout(() => target.isConnected && show(target), event.type === "focusin" ? 0 : 350);
  };
  document.addEventListener("pointerover", (event) => event.pointerType !== "touch" && enter(event));
  document.addEventListener("focusin", (event) => event.target.matches?.(":focus-visible") && enter(event));
  for (const type of ["focusout", "pointerdown", "scroll"]) document.addEventListener(type, hide, { capture: true, passive: true });
}

function remember(key, value) {
  try {
    localStorage.setItem(`vae3d-${key}`, value);
  } catch {
    // Pages from disk may have no storage; the choice then lasts until the page is closed.
  }
}

function recall(key) {
  try {
    return localStorage.getItem(`vae3d-${key}`);
  } catch {
    return null;
  }
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
