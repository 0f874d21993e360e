// The table of a chapter's videos: sorted, filtered, and with rows for what is in view only.
"use strict";

const ROW = 52; // pixels; the CSS says the same. Rows of one height can be placed without being made.
const MARGIN = 6; // rows made above and below those in view

class VideoTable {
  // onopen(video) is called on a click.
  constructor(chapter, ranks, onopen) {
    this.chapter = chapter;
    this.ranks = ranks;
    this.onopen = onopen;
    this.current = null;
    this.sort = { column: null, down: false };
    this.query = "";
    this.shown = [...chapter.videos];
    const { reconstructions, metrics } = chapter;
    this.mode = reconstructions.length > 1 && Object.keys(metrics).length ? { metric: chapter.ranked_by ?? Object.keys(metrics)[0] } : { reconstruction: reconstructions[0] };
    this.texts = new Map(chapter.videos.map((video) => [video, searchText(video)]));

    const help = "Words of names and facts; scores as psnr<30, ssim>=0.9 or psnr=28..30 (of any reconstruction)";
    this.filter = el("input", { type: "search", placeholder: "Filter: words, psnr<30", "aria-label": "Filter videos", "data-tip": help, spellcheck: "false" });
    this.filter.addEventListener("input", () => this.setQuery(this.filter.value));
    this.count = el("output", { class: "count" });
    this.columns = el("span", {});
    this.head = el("thead", {});
    this.body = el("tbody", {});
    this.table = el("table", { class: "videos" }, this.head, this.body);
    this.box = el("div", { class: "videos-box", tabindex: "0", role: "region", "aria-label": "Videos" }, this.table);
    this.box.addEventListener("scroll", () => this.#rows(), { passive: true });
    this.root = el("div", {}, el("div", { class: "videos-tools" }, this.filter, this.columns, this.count), this.box);
    this.setMode(this.mode);
  }

  setMode(mode) {
    this.mode = mode;
    const { reconstructions, metrics } = this.chapter;
    if (reconstructions.length > 1) {
      const options = [
        ["One score, all reconstructions", Object.keys(metrics).map((name) => [`m ${name}`, metricOf(this.chapter, name).label])],
        ["One reconstruction, all scores", reconstructions.map((name) => [`r ${name}`, name])],
      ];
      const chosen = mode.metric !== undefined ? `m ${mode.metric}` : `r ${mode.reconstruction}`;
      const choose = (value) => this.setMode(value[0] === "m" ? { metric: value.slice(2) } : { reconstruction: value.slice(2) });
      this.columns.replaceChildren(el("label", { class: "labelled" }, "Columns ", select("Columns", options, chosen, choose)));
    }
    this.cells = this.#columns();
    this.table.style.setProperty("--columns", this.cells.length);
    if (this.sort.column && this.sort.column !== "name") {
      const same = this.cells.find((cell) => cell.key === this.sort.column);
      if (!same) this.sort = { column: null, down: false };
    }
    this.#apply();
  }

  // Columns of scores: of one metric the reconstructions and their differences to the first, or of one reconstruction all
  // metrics.
  #columns() {
    const { chapter, mode } = this;
    const { reconstructions } = chapter;
    const plain = (name, metric, label) => ({
      key: `${name}\n${metric}`,
      name,
      metric: metricOf(chapter, metric),
      label,
      value: (video) => scoreOf(video, name, metric),
    });
    if (mode.metric === undefined) {
      return Object.keys(chapter.metrics).map((metric) => plain(mode.reconstruction, metric, metricOf(chapter, metric).label));
    }
    const [base, ...rest] = reconstructions;
    const difference = (name) => ({
      key: `${name}\n${mode.metric}\ndifference`,
      difference: true,
      name,
      metric: metricOf(chapter, mode.metric),
      label: `Δ ${name}`,
      note: `${name} − ${base}. `,
      value: (video) => {
        const [left, right] = [scoreOf(video, name, mode.metric), scoreOf(video, base, mode.metric)];
        return left === null || right === null ? null : left - right;
      },
    });
    return [...reconstructions.map((name) => plain(name, mode.metric, name)), ...rest.map(difference)];
  }

  // Shows one metric, sorted by the difference of a reconstruction to the base, worst first.
  showDifference(metric, name) {
    this.sort = { column: `${name}\n${metric}\ndifference`, down: metricOf(this.chapter, metric).better === "lower" };
    this.setMode({ metric });
    this.root.scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
  }

  showRange(metric, low, high) {
    const words = this.query.split(/\s+/).filter((word) => word && !word.startsWith(`${metric}=`));
    this.filter.value = [...words, `${metric}=${low}..${high}`].join(" ");
    this.setQuery(this.filter.value);
    this.root.scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
  }

  setQuery(query) {
    this.query = query;
    this.box.scrollTop = 0;
    this.#apply();
  }

  sortBy(column, better) {
    const { sort } = this;
    // Scores start with the worst, names with the first.
    const worstFirst = better === "lower" || typeof better === "number";
    this.sort = sort.column === column ? { column, down: !sort.down } : { column, down: column !== "name" && worstFirst };
    this.#apply();
  }

  // The video that is `count` rows after another one, as the table is sorted and filtered.
  after(video, count) {
    const index = this.shown.indexOf(video);
    if (index < 0) return this.shown[0] ?? null;
    return this.shown[(index + count + this.shown.length) % this.shown.length];
  }

  position(video) {
    const index = this.shown.indexOf(video);
    return index < 0 ? `not in the filter, of ${this.chapter.videos.length}` : `${index + 1} of ${this.shown.length}`;
  }

  setCurrent(video) {
    this.current = video;
    const index = this.shown.indexOf(video);
    const { scrollTop, clientHeight } = this.box;
    const top = index * ROW;
    const head = this.head.offsetHeight;
    if (index >= 0 && top < scrollTop) this.box.scrollTop = top;
    else if (index >= 0 && top + ROW + head > scrollTop + clientHeight) this.box.scrollTop = top + ROW + head - clientHeight;
    this.#rows(true);
  }

  #apply() {
    const accept = parseQuery(this.query, this.chapter);
    this.shown = this.chapter.videos.filter((video) => accept(video, this.texts.get(video)));
    const { column, down } = this.sort;
    const cell = this.cells.find((one) => one.key === column);
    if (column === "name") {
      this.shown.sort((left, right) => left.name.localeCompare(right.name, undefined, { numeric: true }));
      if (down) this.shown.reverse();
    } else if (cell) {
      // A metric with a best value sorts by the distance to it. What has no score stands last, either way.
      const target = !cell.difference && typeof cell.metric.better === "number" ? cell.metric.better : null;
      const key = (video) => {
        const value = cell.value(video);
        return value === null || target === null ? value : Math.abs(value - target);
      };
      const keys = new Map(this.shown.map((video) => [video, key(video)]));
      this.shown.sort((left, right) => {
        const [a, b] = [keys.get(left), keys.get(right)];
        if (a === null || b === null) return (a === null) - (b === null);
        return down ? b - a : a - b;
      });
    }
    const all = this.chapter.videos.length;
    this.count.textContent = this.shown.length === all ? `${all} ${all === 1 ? "video" : "videos"}` : `${this.shown.length} of ${all} videos`;
    this.#heading();
    this.#rows(true);
  }

  #heading() {
    const sortable = (key, label, metric, cell) => {
      const { column, down } = this.sort;
      const state = column === key ? (down ? "descending" : "ascending") : "none";
      const content = [cell && this.mode.metric !== undefined ? swatch(this.chapter, cell.name) : null, el("span", { class: "label" }, label)];
      const direction = metric ? el("span", { class: "arrow" }, arrow(metric)) : null;
      const mark = el("span", { class: "sorted", "aria-hidden": "true" }, state === "none" ? "" : down ? "▾" : "▴");
      return el(
        "th",
        { scope: "col", "aria-sort": state },
        el("button", { type: "button", "data-tip": metric ? `${cell.note ?? `${cell.label}. `}${explain(metric)}` : null, onclick: () => this.sortBy(key, cell?.difference ? null : metric?.better) }, content, direction, mark),
      );
    };
    const scores = this.cells.map((cell) => sortable(cell.key, cell.label, cell.metric, cell));
    const average = this.cells.map((cell) => {
      const value = mean(this.shown.map(cell.value));
      return el("td", {}, cell.difference && value !== null ? signed(value) : format(value));
    });
    const of = this.shown.length === this.chapter.videos.length ? "Mean" : "Mean of these";
    const means = average.length ? [el("tr", { class: "mean" }, el("th", { scope: "row" }, of), average)] : [];
    this.head.replaceChildren(el("tr", {}, sortable("name", "Video", null, null), scores), ...means);
  }

  // Makes the rows that are in view, between two rows as high as all others.
  #rows(anew = false) {
    const { scrollTop, clientHeight } = this.box;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - MARGIN);
    const last = Math.min(this.shown.length, Math.ceil((scrollTop + (clientHeight || 500)) / ROW) + MARGIN);
    if (!anew && this.made?.[0] === first && this.made[1] === last) return;
    this.made = [first, last];
    const focused = this.body.contains(document.activeElement) ? document.activeElement.closest("tr").dataset.id : null;
    const space = (rows) => (rows > 0 ? el("tr", { class: "space", "aria-hidden": "true" }, el("td", { style: `height:${rows * ROW}px`, colspan: this.cells.length + 1 })) : null);
    const rows = this.shown.slice(first, last).map((video, index) => this.#row(video, first + index));
    if (!rows.length) rows.push(el("tr", {}, el("td", { class: "none", colspan: this.cells.length + 1 }, "No video fits the filter.")));
    this.body.replaceChildren(...[space(first), ...rows, space(this.shown.length - last)].filter(Boolean));
    this.table.setAttribute("aria-rowcount", String(this.shown.length + 2));
    if (focused) this.body.querySelector(`tr[data-id="${CSS.escape(focused)}"] button`)?.focus({ preventScroll: true });
  }

  #row(video, index) {
    const rank = this.ranks.get(video.id);
    const thumbnail = video.thumb ? el("img", { src: /^data:/.test(video.thumb) ? video.thumb : href(video.thumb), alt: "", decoding: "async" }) : null;
    const badges = [
      rank ? el("span", { class: `badge ${rank}` }, rank) : null,
      video.warnings.length ? el("span", { class: "badge warn", "data-tip": video.warnings.join("\n") }, "⚠") : null,
      video.clip ? null : el("span", { class: "badge" }, "no clip"),
    ];
    const open = el(
      "button",
      { type: "button", class: "open", onclick: () => this.onopen(video), title: video.name, "aria-current": video === this.current ? "true" : null },
      el("span", { class: "thumb" }, thumbnail),
      el("span", { class: "video-name" }, video.name),
      badges,
    );
    const values = this.cells.map((cell) => cell.value(video));
    const best = this.#best(values);
    const scores = this.cells.map((cell, column) => {
      const value = values[column];
      const text = cell.difference && value !== null ? signed(value) : format(value);
      return el("td", { class: this.#mark(cell, value, column === best) }, text);
    });
    return el("tr", { "data-id": video.id, class: video === this.current ? "current" : null, "aria-rowindex": index + 3 }, el("th", { scope: "row" }, open), scores);
  }

  // The column of the best reconstruction, if several are compared.
  #best(values) {
    if (this.mode.metric === undefined) return -1;
    let found = -1;
    let least = Infinity;
    let same = false;
    this.cells.forEach((cell, column) => {
      const bad = cell.difference ? null : badness(cell.metric, values[column]);
      if (bad === null) return;
      same = bad === least || (same && bad > least);
      if (bad < least) [found, least] = [column, bad];
    });
    return same ? -1 : found;
  }

  #mark(cell, value, best) {
    if (best) return "best-score";
    if (!cell.difference || value === null || value === 0) return null;
    if (cell.metric.better !== "higher" && cell.metric.better !== "lower") return null;
    return value > 0 === (cell.metric.better === "higher") ? "better" : "worse";
  }
}

function searchText(video) {
  return [video.name, ...Object.entries(video.facts).flat(), ...video.warnings].join("\n").toLowerCase();
}

// A filter as a function of a video: words that must all occur, and conditions on scores.
function parseQuery(query, chapter) {
  const named = new Map();
  for (const name of Object.keys(chapter.metrics)) {
    named.set(name.toLowerCase(), name);
    named.set(metricOf(chapter, name).label.toLowerCase().replace(/\s+/g, ""), name);
  }
  const compare = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };
  const tests = query
    .toLowerCase()
    .replace(/\s*(<=|>=|[<>=])\s*/g, "$1")
    .split(/\s+/)
    .filter(Boolean)
    .map((word) => {
      const [, left, sign, low, high] = /^([^<>=]+)(<=|>=|<|>|=)(-?[\d.e-]+?)(?:\.\.(-?[\d.e-]+))?$/.exec(word) ?? [];
      const metric = named.get(left);
      const limits = [Number(low), Number(high)];
      if (metric === undefined || Number.isNaN(limits[0])) return (video, text) => text.includes(word);
      const fits = sign !== "=" ? (value) => compare[sign](value, limits[0]) : high === undefined ? (value) => format(value) === format(limits[0]) : (value) => value >= limits[0] && value <= limits[1];
      return (video) => chapter.reconstructions.some((name) => scoreOf(video, name, metric) !== null && fits(scoreOf(video, name, metric)));
    });
  return (video, text) => tests.every((test) => test(video, text));
}
