// Curves over optimizer steps, drawn by uPlot. Their legend is text: the newest values, or those under the
// pointer.

import { arrange, h } from "./dom.js";
import { bytes, number, tickDigits } from "./format.js";
import uPlot from "./vendor/uplot-1.6.32/uPlot.esm.js";

const HEIGHT = 200;
const REWARDS = ["chosen", "rejected"];
const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];

/** Charts in the page's order: title, metrics with their names in the chart, and how values are shown. */
export const CHARTS = [
  { title: "Loss", metrics: { train_loss: "training", validation_loss: "validation" } },
  {
    title: "Rewards",
    metrics: Object.fromEntries(
      REWARDS.flatMap((name) => [
        [`rewards/${name}`, name],
        [`validation_rewards/${name}`, `validation: ${name}`],
      ]),
    ),
  },
  {
    title: "Reward accuracy",
    metrics: { "rewards/accuracies": "training", "validation_rewards/accuracies": "validation" },
  },
  {
    title: "Reward margin",
    metrics: { "rewards/margins": "training", "validation_rewards/margins": "validation" },
  },
  { title: "KL estimate", metrics: { kl: "training" } },
  { title: "Perplexity", metrics: { perplexity: "validation" } },
  { title: "Learning rate", metrics: { learning_rate: "rate" } },
  { title: "Tokens per second", metrics: { tokens_per_second: "tokens/s" } },
  { title: "Gradient norm", metrics: { gradient_norm: "norm" } },
  { title: "Peak memory", metrics: { peak_memory_bytes: "memory" }, value: bytes },
];

/** The charts of one or several jobs, in an element; those without a curve are not there. */
export class ChartBoard {
  constructor(element) {
    this.element = element;
    this.charts = new Map();
    document.addEventListener("themechange", () => this.redraw());
  }

  /** @param {{job_uuid: string, metrics: Object<string, [number[], number[]]>}[]} jobs */
  update(jobs) {
    this.jobs = jobs;
    const figures = CHARTS.flatMap((kind) => {
      const lines = linesOf(kind, jobs);
      if (!lines.length) return [];
      const chart = this.charts.get(kind.title) ?? new Chart(kind);
      this.charts.set(kind.title, chart);
      chart.update(lines);
      return [chart.figure];
    });
    if (!figures.length) figures.push(h("p", { class: "muted" }, "There are no metrics yet."));
    arrange(this.element, figures);
    for (const chart of this.charts.values()) chart.fit();
  }

  redraw() {
    for (const chart of this.charts.values()) chart.clear();
    if (this.jobs) this.update(this.jobs);
  }
}

function linesOf(kind, jobs) {
  const kinds = Object.entries(kind.metrics);
  return jobs.flatMap((job, index) =>
    kinds.flatMap(([metric, name], variant) => {
      const curve = job.metrics[metric];
      if (!curve) return [];
      if (jobs.length === 1) return [{ label: name, curve, color: variant, dash: 0 }];
      const label = kinds.length > 1 ? `${job.job_uuid} · ${name}` : job.job_uuid;
      return [{ label, curve, color: index, dash: variant }];
    }),
  );
}

class Chart {
  constructor(kind) {
    this.kind = kind;
    this.value = kind.value ?? number;
    this.plot = h("div", { class: "plot", "aria-hidden": "true" });
    this.legend = h("ul", { class: "legend" });
    this.figure = h("figure", { class: "chart" }, h("figcaption", {}, kind.title), this.legend, this.plot);
    this.drawn = null;
    this.plot.addEventListener("dblclick", () => (this.zoomed = false));
    new ResizeObserver(() => this.fit()).observe(this.plot);
  }

  update(lines) {
    const labels = JSON.stringify(lines.map((line) => [line.label, line.color]));
    const data = uPlot.join(lines.map((line) => line.curve));
    this.lines = lines;
    if (this.drawn && labels === this.labels) this.redraw(data);
    else this.draw(data, labels);
    this.tell();
  }

  draw(data, labels) {
    this.clear();
    this.labels = labels;
    this.zoomed = false;
    this.drawn = new uPlot(this.options(), data, this.plot);
  }

  /** Draw new data; what somebody has zoomed to stays. */
  redraw(data) {
    const { min, max } = this.drawn.scales.x;
    this.drawn.batch(() => {
      this.drawn.setData(data);
      if (this.zoomed) this.drawn.setScale("x", { min, max });
    });
  }

  /** Fill the legend with each line's last value up to the pointer's step, or else with its newest. */
  tell(plot = this.drawn) {
    const newest = Math.max(...this.lines.map((line) => line.curve[0].at(-1)));
    const step = plot?.data[0][plot.cursor.idx] ?? newest;
    const entries = this.lines.map((line) => {
      const [steps, values] = line.curve;
      const value = values[steps.findLastIndex((known) => known <= step)];
      const swatch = h("span", { class: `swatch series-${line.color} dash-${line.dash}` });
      return h("li", {}, swatch, `${line.label} `, h("b", {}, this.value(value)));
    });
    this.legend.replaceChildren(...entries, h("li", { class: "muted" }, `step ${step}`));
  }

  options() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: color("--muted"),
      grid: { stroke: color("--line"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui",
    };
    return {
      width: this.width(),
      height: HEIGHT,
      legend: { show: false },
      scales: { x: { time: false } },
      cursor: { drag: { x: true, y: false }, points: { size: 6 } },
      hooks: {
        setCursor: [(plot) => this.tell(plot)],
        setSelect: [(plot) => (this.zoomed ||= plot.select.width > 0)],
      },
      axes: [
        {
          ...axis,
          size: 28,
          values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick : "")),
        },
        { ...axis, size: widthOf, values: (_, ticks) => this.tickLabels(ticks) },
      ],
      series: [
        {},
        ...this.lines.map((line) => ({
          label: line.label,
          stroke: color(`--series-${line.color}`),
          width: 1.75,
          dash: DASHES[line.dash],
          spanGaps: true,
          points: { show: (_, place) => this.lines[place - 1].curve[0].length < 30, size: 4 },
        })),
      ],
    };
  }

  tickLabels(ticks) {
    const increment = ticks.length > 1 ? ticks[1] - ticks[0] : 1;
    return ticks.map((tick) => this.value(tick, tickDigits(tick, increment)));
  }

  width() {
    return Math.max(220, this.plot.clientWidth);
  }

  fit() {
    if (this.drawn && this.drawn.width !== this.width()) {
      this.drawn.setSize({ width: this.width(), height: HEIGHT });
    }
  }

  clear() {
    this.drawn?.destroy();
    this.drawn = null;
  }
}

/** Return the pixels that the longest label of the values' axis takes. */
function widthOf(_, labels) {
  return Math.max(62, 16 + 6.5 * Math.max(...(labels ?? [""]).map((label) => String(label).length)));
}
