// Numbers for people. Pure.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
const NBSP = "\u00a0";

export function bytes(value) {
  if (value == null) return "–";
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)}${NBSP}${UNITS[unit]}`;
}

export const rate = (value) => (value == null ? "–" : value === 0 ? "0" : `${bytes(value)}/s`);

export function count(value) {
  if (value == null) return "–";
  if (Math.abs(value) >= 1e6) return `${(value / 1e6).toFixed(1)}${NBSP}M`;
  if (Math.abs(value) >= 10 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value.toFixed(1);
}

export const percent = (value) => (value == null || Number.isNaN(value) ? "–" : `${Math.round(value * 100)}%`);

/** A length of time. */
export function seconds(value) {
  if (value == null) return "–";
  if (value < 0.9995) return value === 0 ? `0${NBSP}s` : value < 0.001 ? `<1${NBSP}ms` : `${Math.round(value * 1000)}${NBSP}ms`;
  if (value < 10 && !Number.isInteger(value)) return `${value.toFixed(1)}${NBSP}s`;
  if (value < 100) return `${Math.round(value)}${NBSP}s`;
  if (value < 5400) return `${Math.round(value / 60)}${NBSP}min`;
  if (value < 36 * 3600) return `${(value / 3600).toFixed(1)}${NBSP}h`;
  return `${(value / 86400).toFixed(1)}${NBSP}d`;
}

/** How long ago, or in how long. */
export function ago(time, now) {
  const away = now - time;
  if (Math.abs(away) < 1.5) return "now";
  return away > 0 ? `${seconds(Math.round(away))} ago` : `in ${seconds(Math.round(-away))}`;
}

/** A time of day, in the reader's zone. */
export const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const money = (value) => (value == null ? "–" : `$${value.toFixed(2)}`);

export const short = (key) => key.slice(0, 8);
