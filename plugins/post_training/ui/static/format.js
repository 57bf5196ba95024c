// Numbers, times and names as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export const STATUS_NAMES = {
  scheduled: "Scheduled",
  in_progress: "In progress",
  completed: "Completed",
  failed: "Failed",
  cancelled: "Cancelled",
};

/** Four significant digits, or as many as are asked for; an exponent where those would not do. */
export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const rounded = Number.isInteger(value) ? value : Number(value.toPrecision(digits));
  const size = Math.abs(rounded);
  if (size !== 0 && (size < 0.001 || size >= 1e9)) return Number(value.toPrecision(digits)).toExponential();
  return rounded.toLocaleString("en", { maximumFractionDigits: 20 });
}

export function bytes(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const power = value > 0 ? Math.min(UNITS.length - 1, Math.floor(Math.log2(value) / 10)) : 0;
  return `${Number((value / 1024 ** power).toPrecision(digits))} ${UNITS[power]}`;
}

/** How many significant digits tell a tick of an axis from the next one. */
export function tickDigits(value, increment) {
  if (value === 0) return 1;
  const place = (size) => Math.floor(Math.log10(Math.abs(size)) + 1e-9);
  return Math.min(15, Math.max(1, place(value) - place(increment) + 2));
}

/** Seconds as "2 h 5 min", by the two largest units. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const parts = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([count]) => count > 0);
  if (first < 0) return "0 s";
  return parts
    .slice(first, first + 2)
    .filter(([count]) => count > 0)
    .map(([count, unit]) => `${count} ${unit}`)
    .join(" ");
}

/** Seconds from one ISO time to another, which may be open. */
export function elapsed(from, to) {
  if (!from) return null;
  return ((to ? Date.parse(to) : Date.now()) - Date.parse(from)) / 1000;
}

/** The reader's own time, to the minute, with its distance from UTC: Airflow may show another zone's. */
export function time(iso) {
  if (!iso) return "–";
  const moment = new Date(iso);
  const two = (value) => String(value).padStart(2, "0");
  const day = [moment.getFullYear(), two(moment.getMonth() + 1), two(moment.getDate())].join("-");
  const east = -moment.getTimezoneOffset();
  const [hours, minutes] = [Math.floor(Math.abs(east) / 60), Math.abs(east) % 60];
  const zone = `${east < 0 ? "-" : "+"}${two(hours)}:${two(minutes)}`;
  return `${day} ${two(moment.getHours())}:${two(moment.getMinutes())} ${zone}`;
}

/** The end of a path or of a URI, which is what tells models apart; where the request is known and names none,
 * it is the deployment's. */
export function modelName({ model, algorithm }) {
  if (!model) return algorithm ? "deployment's default" : "–";
  const text = String(model);
  return text.startsWith("models:") ? text : text.replace(/\/+$/, "").split("/").slice(-2).join("/");
}
