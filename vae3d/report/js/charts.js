// Curves over frames, histograms, charts of trainings (uPlot), and differences with their intervals.
"use strict";

const plots = new Set(); // to draw anew when the theme changes

// A uPlot in the element, as wide as it is. build() gives [options, data] and reads colours from the theme.
function plot(host, build) {
  let chart = null;
  const size = () => ({ width: Math.max(host.clientWidth, 120), height: host.clientHeight });
  const draw = () => {
    chart?.destroy();
    const [options, data] = build();
    chart = new uPlot({ ...size(), legend: { show: false }, ...options }, data, host);
  };
  const observer = new ResizeObserver(() => chart?.setSize(size()));
  const handle = {
    draw,
    get chart() {
      return chart;
    },
    destroy() {
      observer.disconnect();
      plots.delete(handle);
      chart?.destroy();
    },
  };
  draw();
  observer.observe(host);
  plots.add(handle);
  return handle;
}

function redrawPlots() {
  plots.forEach((one) => one.draw());
}

function axes(labels = {}) {
  const line = { stroke: cssValue("--line"), width: 1 };
  const axis = { stroke: cssValue("--muted"), grid: line, ticks: { ...line, size: 4 }, font: "11px system-ui, sans-serif" };
  const values = (chart, ticks) => ticks.map((value) => (value === null ? "" : shortNumber(value)));
  return [
    { ...axis, size: 26, label: labels.x, labelSize: 16, labelFont: axis.font, space: 48, values },
    { ...axis, size: 52, label: labels.y, labelSize: 16, labelFont: axis.font, space: 28, values },
  ];
}

function shortNumber(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(0).replace("e+", "e").replace("-", "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

// The curves of one clip, none of an image. onframe(frame) is called on a click; `.show(frame)` marks the frame in all of them.
function curvesOf(chapter, curves, frames, onframe) {
  const names = chapter.reconstructions.filter((name) => curves[name]);
  const drawn = (metric) => names.some((name) => curves[name][metric]?.some((value) => value !== null));
  const known = [...new Set([...Object.keys(chapter.metrics), ...names.flatMap((name) => Object.keys(curves[name]))])];
  const metrics = frames > 1 ? known.filter(drawn) : []; // the scores of an image stand below it
  const root = el("div", { class: "curves" });
  const shown = metrics.map((metric) => curve(metric));
  const charts = shown.map(({ figure, host, build }) => {
    root.append(figure);
    return { host, build, handle: null };
  });

  function curve(metric) {
    const about = metricOf(chapter, metric);
    const readout = el("output", { class: "readout" });
    const host = el("div", { class: "plot", role: "img", "aria-label": `${about.label} of each frame` });
    const title = el("span", { class: "title", "data-tip": explain(about), tabindex: "0" }, about.label, " ", arrow(about));
    const figure = el("figure", { class: "curve" }, el("figcaption", {}, title, readout), host);
    const series = names.filter((name) => curves[name][metric]);
    const x = Array.from({ length: frames }, (_, frame) => frame);
    const build = () => [
      {
        scales: { x: { time: false, range: [0, Math.max(frames - 1, 1)] } },
        axes: axes(),
        cursor: { sync: { key: "frames" }, points: { size: 6 }, drag: { x: false, y: false }, y: false },
        series: [
          {},
          ...series.map((name) => ({
            label: name,
            stroke: colourOf(chapter, name),
            dash: dashOf(chapter.reconstructions.indexOf(name)),
            width: 1.5,
            points: { show: frames <= 40, size: 4 },
          })),
        ],
        hooks: { ready: [(chart) => mark(chart)] },
      },
      [x, ...series.map((name) => x.map((frame) => curves[name][metric][frame] ?? null))],
    ];
    const line = el("div", { class: "now" });
    const mark = (chart) => {
      chart.over.append(line);
      chart.over.addEventListener("click", () => chart.cursor.idx !== null && onframe(chart.cursor.idx));
      move(chart);
    };
    let now = 0;
    const move = (chart) => {
      line.style.left = `${(now / Math.max(frames - 1, 1)) * 100}%`;
      readout.replaceChildren(
        ...series.map((name) => el("span", {}, swatch(chapter, name), format(curves[name][metric][now] ?? null))),
      );
    };
    return { figure, host, build, show: (frame) => ((now = frame), move()) };
  }

  // uPlot measures its element, which must be in the document first.
  root.start = () => charts.forEach((one) => (one.handle = plot(one.host, one.build)));
  root.show = (frame) => shown.forEach((one) => one.show(frame));
  root.destroy = () => charts.forEach((one) => one.handle?.destroy());
  return root;
}

const HISTOGRAM_VIDEOS = 5; // fewer are better read in the table

function histograms(chapter, onrange) {
  const figures = Object.keys(chapter.metrics).map((metric) => histogram(chapter, metric, onrange));
  return el("div", { class: "curves" }, figures.filter(Boolean));
}

function histogram(chapter, metric, onrange) {
  const about = metricOf(chapter, metric);
  const all = chapter.reconstructions.map((name) => ({
    name,
    values: chapter.videos.map((video) => scoreOf(video, name, metric)).filter((value) => value !== null),
  }));
  const series = all.filter(({ values }) => values.length >= HISTOGRAM_VIDEOS);
  if (!series.length) return null;
  const { edges, counts } = bins(series.map(({ values }) => values));
  const host = el("div", { class: "plot", role: "img", "aria-label": `Distribution of ${about.label} over videos` });
  const readout = el("output", { class: "readout" });
  const means = series.map(({ name, values }) => el("span", {}, swatch(chapter, name), `mean ${format(mean(values))}`));
  readout.append(...means);
  const title = el("span", { class: "title", "data-tip": explain(about), tabindex: "0" }, about.label, " ", arrow(about));
  const build = () => [
    {
      scales: { x: { time: false, range: [edges[0], edges.at(-1)] }, y: { range: (chart, low, high) => [0, high * 1.08] } },
      axes: axes({ x: about.unit || undefined }),
      cursor: { drag: { x: false, y: false }, y: false, points: { show: false } },
      series: [
        {},
        ...series.map(({ name }) => ({
          label: name,
          stroke: colourOf(chapter, name),
          fill: `${colourOf(chapter, name)}33`,
          width: 1.5,
          paths: uPlot.paths.stepped({ align: 1 }),
          points: { show: false },
        })),
      ],
      hooks: {
        ready: [
          (chart) =>
            chart.over.addEventListener("click", () => {
              const value = chart.posToVal(chart.cursor.left, "x");
              const index = edges.findLastIndex((edge) => edge <= value);
              if (index >= 0 && index < edges.length - 1) onrange(metric, edges[index], edges[index + 1]);
            }),
        ],
      },
    },
    [edges, ...counts.map((one) => [...one, one.at(-1)])],
  ];
  whenSeen(host, () => plot(host, build));
  return el("figure", { class: "curve" }, el("figcaption", {}, title, readout), host);
}

// Bins of round width that hold all values of all lists.
function bins(lists) {
  const all = lists.flat();
  let low = all[0];
  let high = all[0];
  for (const value of all) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const wanted = clamp(Math.ceil(Math.sqrt(lists[0].length)) + 2, 5, 30);
  const width = roundUp((high - low) / wanted || Math.abs(high) / 10 || 1);
  const first = Math.floor(low / width);
  const count = Math.max(1, Math.floor(high / width) - first + 1);
  const edges = Array.from({ length: count + 1 }, (_, index) => Number(((first + index) * width).toPrecision(10)));
  const counts = lists.map((values) => {
    const own = new Array(count).fill(0);
    for (const value of values) own[clamp(Math.floor(value / width) - first, 0, count - 1)] += 1;
    return own;
  });
  return { edges, counts };
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999) ?? 10 * power;
}

function lineChart(data) {
  const names = Object.keys(data.series);
  const tables = names.map((name) => {
    const points = data.series[name].filter(([x]) => x !== null).sort((left, right) => left[0] - right[0]);
    return [points.map(([x]) => x), points.map(([, y]) => (y === null || (data.log && y <= 0) ? null : y))];
  });
  const joined = tables.length > 1 ? uPlot.join(tables) : tables[0] ?? [[], []];
  const host = el("div", { class: "plot tall", role: "img", "aria-label": `${data.title}: ${names.join(", ")}` });
  const entries = names.map((name, index) => {
    const value = el("output", {});
    const dot = el("span", { class: "swatch", style: `background:var(--series-${index % COLOURS})`, "aria-hidden": "true" });
    return { item: el("li", {}, dot, name, value), value };
  });
  const build = () => [
    {
      scales: { x: { time: false }, y: { distr: data.log ? 3 : 1 } },
      axes: axes({ x: data.x, y: data.y || undefined }),
      cursor: { drag: { x: true, y: false } },
      series: [
        {},
        ...names.map((name, index) => ({
          label: name,
          stroke: cssValue(`--series-${index % COLOURS}`),
          dash: dashOf(index),
          width: 1.5,
          spanGaps: true,
          points: { show: joined[0].length <= 30, size: 4 },
        })),
      ],
      hooks: {
        setCursor: [
          (chart) =>
            entries.forEach(({ value }, index) => {
              const at = chart.cursor.idxs?.[index + 1];
              const y = at === null || at === undefined ? null : joined[index + 1][at];
              value.textContent = y === null || y === undefined ? "" : format(y);
            }),
        ],
      },
    },
    joined,
  ];
  whenSeen(host, () => plot(host, build));
  const caption = el("figcaption", {}, el("span", { class: "title" }, data.title));
  return el("figure", { class: "curve" }, caption, host, el("ul", { class: "legend" }, entries.map(({ item }) => item)));
}

// Differences of means with 95 % intervals, each metric on its own scale: what is right of the line is higher, green or
// blue and "better" says which side is good. onmetric(metric, name) is called on a click.
function differencesOf(chapter, onmetric) {
  const groups = new Map();
  for (const one of chapter.differences) groups.set(one.metric, [...(groups.get(one.metric) ?? []), one]);
  const root = el("div", { class: "forest" });
  for (const [name, group] of groups) {
    const metric = metricOf(chapter, name);
    const reach = Math.max(...group.flatMap((one) => [one.difference, one.low ?? 0, one.high ?? 0]).map(Math.abs)) * 1.1 || 1;
    const tip = `${explain(metric)} Shows it in the table.`;
    for (const [index, one] of group.entries()) {
      const label = index === 0 ? [metric.label, " ", arrow(metric)] : "";
      root.append(
        el(
          "button",
          { type: "button", class: index === 0 ? "first" : "", "data-tip": tip, onclick: () => onmetric(name, one.name) },
          el("span", { class: "metric" }, label),
          el("span", { class: "pair" }, swatch(chapter, one.name), one.name, el("i", {}, " − "), one.against),
          interval(one, reach, verdict(metric, one)),
          el("span", { class: "numbers" }, differenceText(one)),
          el("span", { class: `verdict ${verdict(metric, one)}` }, verdictText(metric, one)),
          el("span", { class: "wins" }, one.better_on === null ? "" : `better on ${one.better_on} of ${one.videos}`),
        ),
      );
    }
  }
  return root;
}

// "better", "worse", or "undecided" if the interval holds zero or the metric has no direction.
function verdict(metric, one) {
  if (one.low === null || one.high === null || (one.low <= 0 && one.high >= 0)) return "undecided";
  if (metric.better !== "higher" && metric.better !== "lower") return "undecided";
  return one.difference > 0 === (metric.better === "higher") ? "better" : "worse";
}

function verdictText(metric, one) {
  const word = verdict(metric, one);
  const apart = one.low !== null && one.high !== null && (one.low > 0 || one.high < 0);
  return word === "undecided" && apart ? "different" : word;
}

function differenceText(one) {
  const range = one.low === null || one.high === null ? "" : ` [${signed(one.low)}, ${signed(one.high)}]`;
  return signed(one.difference) + range;
}

function interval(one, reach, kind) {
  const at = (value) => 50 + (value / reach) * 50;
  const drawing = svg("svg", { class: `interval ${kind}`, viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  drawing.append(svg("line", { class: "zero", x1: 50, x2: 50, y1: 0, y2: 10 }));
  if (one.low !== null && one.high !== null) {
    drawing.append(svg("line", { class: "range", x1: at(one.low), x2: at(one.high), y1: 5, y2: 5 }));
  }
  const point = el("i", { class: "point", style: `left:${at(one.difference)}%` });
  return el("span", { class: `scale ${kind}` }, drawing, point);
}
