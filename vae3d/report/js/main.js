// Builds the page from the report: chapters with their players and tables, contents, help, links, theme.
"use strict";

const KEYS = [
  ["space", "play, pause"],
  ["← →", "one frame; with Shift ten"],
  ["Home End", "first, last frame"],
  ["m", "next worst frame"],
  [", .", "slower, faster"],
  ["r", "loop"],
  ["n p", "next, previous video of the table"],
  ["1 2 3 4", "side by side, wipe, blink, turn a panorama"],
  ["x", "show the other picture of a pair"],
  ["o e c", "picture, error, change since the frame before"],
  ["[ ]", "darker, brighter error and change"],
  ["+ − 0", "zoom in, out, whole picture"],
  ["w a s d", "move the view, the lens, or turn the panorama"],
  ["g", "lens"],
  ["l", "copy a link to this view"],
  ["f", "full screen"],
  ["t", "dark or light"],
  ["?", "this help"],
];

const page = { chapters: [], active: null, linking: 0, theme: recall("theme") };

// Shows another page of the same videos in place of this one, at the same frame and view: for a program that writes its
// page again, with other settings.
function replaceReport(next) {
  const player = page.active?.player;
  if (player?.clip) history.replaceState(null, "", (page.link = player.link()));
  const play = player?.media?.playing ?? false;
  document.querySelectorAll("script.clip").forEach((old) => old.remove());
  document.body.append(...next.querySelectorAll("script.clip"));
  showReport(JSON.parse(next.getElementById("report").textContent), { play });
}

function showReport(report, { play = false } = {}) {
  page.chapters.forEach(({ player }) => player?.close());
  document.title = report.title;
  const heading = el("h1", {}, report.title);
  const body = el("main", {}, heading);
  if (report.text) body.append(html("div", { class: "text" }, report.text));
  body.append(...warnings(report.warnings));
  if (Object.keys(report.links).length) body.append(el("p", { class: "files" }, links(report.links)));
  const contents = el("ol", {});
  page.chapters = report.chapters.map((chapter, index) => buildChapter(chapter, `chapter-${index + 1}`, report.chapters.length > 1));
  for (const { root, entries } of page.chapters) {
    body.append(root);
    contents.append(...entries);
  }
  const facts = buildFacts(report);
  if (facts) {
    body.append(facts);
    contents.append(entry("Facts", "facts"));
  }
  const wide = matchMedia("(min-width: 80rem)");
  const navigation = el("details", { class: "contents", open: wide.matches }, el("summary", {}, "Contents"), el("nav", { "aria-label": "Contents" }, contents));
  wide.addEventListener("change", () => (navigation.open = wide.matches));
  document.querySelectorAll("body > header, body > .layout").forEach((old) => old.remove());
  const header = buildHeader(report);
  document.body.prepend(header, el("div", { class: "layout" }, navigation, body));
  // The title stands in the header while the heading is out of view.
  new IntersectionObserver(([{ isIntersecting }]) => header.classList.toggle("titled", !isIntersecting)).observe(heading);
  for (const built of page.chapters.filter(({ table }) => table)) {
    built.table.setCurrent(null); // rows need the height of the box
    offer(built);
  }
  followLink({ play }) || openFirst();
}

function buildHeader(report) {
  return el(
    "header",
    {},
    el("a", { href: "#", class: "brand" }, report.title),
    button("?", "Keys", toggleHelp, { key: "?" }),
    button("theme", "Dark or light", switchTheme, { key: "t" }),
  );
}

function entry(text, id, ...children) {
  return el("li", {}, el("a", { href: `#${id}` }, text), children);
}

function buildChapter(chapter, id, titled) {
  const root = el("section", { class: "chapter", id, "aria-label": chapter.title });
  const parts = [];
  const add = (title, name, ...content) => {
    const own = `${id}-${name}`;
    parts.push(entry(title, own));
    root.append(el("section", { id: own }, el("h3", { class: "part" }, title), content));
  };
  if (titled || chapter.title) root.append(el("h2", {}, chapter.title));
  if (chapter.text) root.append(html("div", { class: "text" }, chapter.text));
  root.append(...warnings(chapter.warnings));
  const built = { chapter, root, player: null, table: null };
  if (chapter.videos.length) buildVideos(built, add, parts);
  if (chapter.differences.length) {
    const note = el("p", { class: "note" }, "Mean difference over videos, with its 95 % interval. Each score has its own scale. A click shows its videos, worst first.");
    add("Differences", "differences", note, differencesOf(chapter, (metric, name) => built.table?.showDifference(metric, name)));
  }
  if (chapter.tables.length) add("Tables", "tables", chapter.tables.map(buildTable));
  if (chapter.charts.length) add("Charts", "charts", el("div", { class: "curves wide" }, chapter.charts.map(lineChart)));
  if (chapter.pictures.length) add("Pictures", "pictures", el("div", { class: "pictures" }, chapter.pictures.map(buildPicture)));
  if (chapter.commands) add("Commands", "commands", commands(chapter.commands));
  built.entries = [entry(chapter.title, id, parts.length > 1 ? el("ol", {}, parts) : null)];
  return built;
}

function buildVideos(built, add, parts) {
  const { chapter, root } = built;
  const ranks = new Map(chapter.ranks); // id of a video -> "worst" or "best", the worst first
  built.ranks = ranks;
  built.table = new VideoTable(chapter, ranks, (video) => openVideo(built, video, { play: !calm() }));
  built.player = new Player(chapter, {
    step: (count) => stepVideo(built, count),
    changed: () => writeLink(built),
  });
  const rankButtons = ["worst", "best"].filter((rank) => [...ranks.values()].includes(rank)).map((rank) => {
    const id = rank === "worst" ? [...ranks].find(([, one]) => one === rank)[0] : [...ranks].findLast(([, one]) => one === rank)[0];
    const video = chapter.videos.find((one) => one.id === id);
    const metric = metricOf(chapter, chapter.ranked_by);
    const tip = `The ${rank} video by ${metric.label}`;
    return el("button", { type: "button", "data-tip": tip, onclick: () => openVideo(built, video, { play: !calm() }) }, `Open the ${rank}`);
  });
  built.player.root.id = `${root.id}-player`;
  root.append(built.player.root);
  parts.push(entry("Player", built.player.root.id));
  add("Videos", "videos", rankButtons.length ? el("div", { class: "rank-buttons" }, rankButtons) : null, built.table.root);
  const distributions = histograms(chapter, (metric, low, high) => built.table.showRange(metric, low, high));
  if (distributions.children.length) {
    const note = el("p", { class: "note" }, "Number of videos by score. A click shows the videos of a bar in the table.");
    add("Distributions", "distributions", note, legend(chapter, chapter.reconstructions), distributions);
  }
}

function buildTable(table) {
  const prose = table.head.map((_, column) => column > 0 && table.rows.some((row) => row[column].length > 40)); // to the left
  const named = (column) => (prose[column] ? { class: "prose" } : {});
  const head = el("tr", {}, table.head.map((cell, column) => el("th", { scope: "col", ...named(column) }, cell)));
  const cells = (row) => row.map((cell, column) => (column ? el("td", named(column), cell) : el("th", { scope: "row" }, cell)));
  const rows = table.rows.map((row) => el("tr", {}, cells(row)));
  const box = el("div", { class: "table-box", tabindex: "0", role: "region", "aria-label": table.title }, el("table", { class: "plain" }, el("thead", {}, head), el("tbody", {}, rows)));
  return el("figure", {}, el("figcaption", { class: "title" }, table.title), box, table.note ? el("p", { class: "note" }, table.note) : null);
}

function buildPicture(picture) {
  const note = picture.note ? el("p", { class: "note" }, picture.note) : null;
  return el("figure", {}, el("figcaption", { class: "title" }, picture.title), html("div", { class: "still-picture" }, picture.html), note);
}

function buildFacts(report) {
  const facts = Object.entries(report.facts);
  if (!facts.length && !report.commands) return null;
  const list = el("dl", { class: "facts wide" }, facts.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))));
  return el("section", { id: "facts" }, el("h2", {}, "Facts"), facts.length ? list : null, report.commands ? commands(report.commands) : null);
}

// ---- Videos and links

// One clip is open on the page: its media are freed when another one opens.
async function openVideo(built, video, options = {}) {
  for (const other of page.chapters) {
    if (other === built || !other.player?.video) continue;
    other.table.setCurrent(null);
    offer(other);
  }
  page.active = built;
  built.table.setCurrent(video);
  await built.player.open(video, { ...options, rank: built.ranks.get(video.id) ?? "", position: built.table.position(video) });
}

function stepVideo(built, count) {
  const from = built.player.video ?? built.chapter.videos[0];
  const next = built.table.after(from, count);
  if (next) openVideo(built, next, { play: built.player.media?.playing ?? false });
}

// Closes the player and offers the first video of the table.
function offer(built) {
  const video = built.table.shown[0] ?? built.chapter.videos[0];
  built.player.offer(el("button", { type: "button", onclick: () => openVideo(built, video, { play: !calm() }) }, icon("play"), `Open ${video.name}`));
}

// The first video of the page is opened, still.
function openFirst() {
  const first = page.chapters.find(({ player }) => player);
  if (first) openVideo(first, first.table.shown[0]);
}

function followLink({ play = false } = {}) {
  const parts = new URLSearchParams(location.hash.slice(1));
  const id = parts.get("video");
  if (!id) return false;
  const built = page.chapters.find(({ chapter }) => chapter.videos.some((video) => video.id === id));
  if (!built) {
    say("The link is to a video that this page does not have.");
    return false;
  }
  readLook(parts);
  const video = built.chapter.videos.find((one) => one.id === id);
  openVideo(built, video, { frame: Number(parts.get("frame")) || 0, play }).then(() => {
    built.player.root.scrollIntoView({ block: "nearest" });
  });
  return true;
}

// The address follows what is shown, but not while it plays: browsers limit how often it may change.
function writeLink(built) {
  if (built !== page.active) return;
  clearTimeout(page.linking);
  page.linking = setTimeout(() => {
    if (built.player.media?.playing || !built.player.clip) return;
    page.link = built.player.link();
    history.replaceState(null, "", page.link);
  }, 300);
}

// ---- Theme, help, keys

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

// What was chosen on this page or an earlier one, else what the browser prefers.
function applyTheme() {
  document.documentElement.dataset.theme = page.theme ?? (prefersDark.matches ? "dark" : "light");
  redrawPlots();
}

function switchTheme() {
  page.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  remember("theme", page.theme);
  applyTheme();
}

function toggleHelp() {
  let dialog = document.getElementById("help");
  if (!dialog) {
    const rows = KEYS.map(([keys, does]) => el("div", {}, el("dt", {}, keys.split(" ").map((key) => el("kbd", {}, key))), el("dd", {}, does)));
    dialog = el(
      "dialog",
      { id: "help", "aria-label": "Keys" },
      el("h2", {}, "Keys"),
      el("dl", {}, rows),
      el("p", { class: "note" }, "Wheel: zooms once the pictures were clicked, or with Ctrl. Drag: moves. Double click: whole picture."),
      button("Close", "Close", () => dialog.close()),
    );
    document.body.append(dialog);
  }
  if (dialog.open) dialog.close();
  else dialog.showModal();
}

function onKey(event) {
  const { target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (target.matches("textarea, select, input:not([type=range])")) return;
  // These keys are the browser's there: they press the button, move the slider, scroll the box.
  if (target.matches("button, a, summary") && [" ", "Enter"].includes(event.key)) return;
  if (target.matches("input[type=range]") && /^(Arrow|Home|End|Page)/.test(event.key)) return;
  if (target.matches("pre, .table-box, .videos-box") && /^(Arrow|Home|End|Page)/.test(event.key)) return;
  if (event.key === "?") toggleHelp();
  else if (document.getElementById("help")?.open) return;
  else if (event.key === "t") switchTheme();
  else if (page.active && "np".includes(event.key)) stepVideo(page.active, event.key === "n" ? 1 : -1);
  else if (!page.active?.player.key(event)) return;
  event.preventDefault();
}

installFilters();
installTooltips();
applyTheme();
prefersDark.addEventListener("change", applyTheme);
document.addEventListener("keydown", onKey);
addEventListener("hashchange", () => location.hash !== page.link && followLink());
showReport(JSON.parse(document.getElementById("report").textContent));
