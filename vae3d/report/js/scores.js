// What scores mean: names, directions, formats and colours of reconstructions.
"use strict";

const COLOURS = 8; // of reconstructions, as CSS variables --series-0 ... of each theme

function metricOf(chapter, name) {
  return chapter.metrics[name] ?? { label: name, better: null, meaning: "", unit: "" };
}

function format(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2).replace("-", "−").replace("e+", "e");
  const digits = size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4;
  return value.toFixed(digits).replace("-", "−");
}

const signed = (value) => (value > 0 ? "+" : "") + format(value);

function arrow(metric) {
  if (metric.better === "higher") return "↑";
  if (metric.better === "lower") return "↓";
  return metric.better === null ? "" : `→ ${metric.better}`;
}

function explain(metric) {
  const direction =
    metric.better === null
      ? ""
      : typeof metric.better === "number"
        ? `Best near ${metric.better}.`
        : `${metric.better === "higher" ? "Higher" : "Lower"} is better.`;
  const unit = metric.unit ? `In ${metric.unit}.` : "";
  return [metric.meaning, direction, unit].filter(Boolean).join(" ");
}

// How bad a value is: larger is worse. null if the metric has no better and worse.
function badness(metric, value) {
  if (metric.better === null || value === null || value === undefined) return null;
  if (metric.better === "higher") return -value;
  return metric.better === "lower" ? value : Math.abs(value - metric.better);
}

const scoreOf = (video, reconstruction, metric) => video.scores[reconstruction]?.[metric] ?? null;

function mean(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

// The worst frame of each reconstruction, by the metric that ranks if it has a curve, else by the first that has one.
function worstFrames(chapter, curves) {
  const found = [];
  for (const name of chapter.reconstructions) {
    const own = curves[name] ?? {};
    const names = Object.keys(own).filter((one) => metricOf(chapter, one).better !== null);
    const chosen = names.includes(chapter.ranked_by) ? chapter.ranked_by : names[0];
    if (!chosen) continue;
    const metric = metricOf(chapter, chosen);
    let worst = null;
    own[chosen].forEach((value, frame) => {
      const bad = badness(metric, value);
      if (bad !== null && (worst === null || bad > worst.bad)) worst = { bad, frame, value };
    });
    if (worst) found.push({ name, metric, ...worst });
  }
  return found;
}

const cssValue = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// CSS colour of a reconstruction; the original is neutral.
function colourVariable(chapter, name) {
  const index = chapter.reconstructions.indexOf(name);
  return index < 0 ? "var(--muted)" : `var(--series-${index % COLOURS})`;
}

function colourOf(chapter, name) {
  return cssValue(colourVariable(chapter, name).slice(4, -1));
}

// Colours repeat after eight reconstructions; lines then are dashed.
function dashOf(index) {
  return index < COLOURS ? [] : [6, 4];
}

function swatch(chapter, name) {
  return el("span", { class: "swatch", style: `background:${colourVariable(chapter, name)}`, "aria-hidden": "true" });
}

function legend(chapter, names) {
  return el(
    "ul",
    { class: "legend" },
    names.map((name) => el("li", {}, swatch(chapter, name), name)),
  );
}
