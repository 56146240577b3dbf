// What the counters were lately, so that there are rates and a history to draw. Kept in the page, for an hour.

const KEPT_SECONDS = 3660;

/** A metric of a node by name and labels, as the API names it: labels in alphabetical order. 0 when there is none. */
export function gauge(node, name, labels = {}) {
  const text = Object.keys(labels).sort().map((label) => `${label}=${labels[label]}`).join(",");
  return node.counters[text ? `kvstore_${name}{${text}}` : `kvstore_${name}`] ?? 0;
}

export const counter = (node, name, labels) => gauge(node, `${name}_total`, labels);

/** "closed", "open" or "half_open"; a tier without a breaker is closed. */
export const breakerOf = (node, tier) => ["open", "half_open"].find((state) => gauge(node, "breaker_state", { state, tier })) ?? "closed";

/** Each series of a counter, as `[labels, value]`. */
export function series(node, name) {
  const start = `kvstore_${name}_total`;
  return Object.entries(node.counters)
    .filter(([sample]) => sample === start || sample.startsWith(`${start}{`))
    .map(([sample, value]) => [labelsOf(sample), value]);
}

export const total = (node, name) => series(node, name).reduce((sum, [, value]) => sum + value, 0);

function labelsOf(sample) {
  const inside = sample.match(/\{(.*)\}$/)?.[1];
  return inside ? Object.fromEntries(inside.split(",").map((label) => label.split("="))) : {};
}

export const TIERS = ["host", "disk", "object", "remote"];

/** What is drawn over time, taken from a node's status. */
function read(node) {
  const values = {
    asked: counter(node, "asked_tokens"),
    requests: counter(node, "requests"),
    published: counter(node, "published_blocks"),
    delivered: total(node, "delivered_blocks"),
    spared: counter(node, "spared_prefill_seconds"),
  };
  for (const tier of TIERS) {
    values[`found ${tier}`] = counter(node, "found_tokens", { tier });
    values[`get ${tier}`] = counter(node, "tier_bytes", { tier, operation: "get" });
    values[`put ${tier}`] = counter(node, "tier_bytes", { tier, operation: "put" });
  }
  return values;
}

export class Samples {
  constructor() {
    this.rows = [];
  }

  /** Samples of a node that ran before are no base for a difference: they have another `epoch`. */
  add(time, node) {
    const last = this.rows.at(-1);
    if (last && time <= last.time) return;
    this.rows.push({ time, epoch: node.epoch, values: read(node) });
    while (this.rows[0].time < time - KEPT_SECONDS) this.rows.shift();
  }

  /** How much a counter grew within the last `seconds`, and over how long that was; null before there are two samples. */
  growth(name, seconds) {
    const last = this.rows.at(-1);
    const first = last && this.rows.find((row) => row.epoch === last.epoch && row.time >= last.time - seconds - 0.5);
    if (!first || first === last) return null;
    return { by: last.values[name] - first.values[name], over: last.time - first.time };
  }

  /** Per second, over the last `seconds`. */
  rate(name, seconds = 5) {
    const grown = this.growth(name, seconds);
    return grown && grown.by / grown.over;
  }

  /** Tokens asked for and found by tier, in `count` steps of `step` seconds, oldest first; null where nothing was seen. */
  lookups(step, count) {
    const end = Math.floor((this.rows.at(-1)?.time ?? 0) / step) + 1;
    const bins = Array.from({ length: count }, (_, at) => ({ start: (end - count + at) * step, seen: false, asked: 0, found: {} }));
    for (let at = 1; at < this.rows.length; at += 1) {
      const [before, row] = [this.rows[at - 1], this.rows[at]];
      const bin = bins[Math.floor(row.time / step) - (end - count)];
      if (!bin || before.epoch !== row.epoch) continue;
      bin.seen = true;
      bin.asked += row.values.asked - before.values.asked;
      for (const tier of TIERS) {
        const name = `found ${tier}`;
        bin.found[tier] = (bin.found[tier] ?? 0) + row.values[name] - before.values[name];
      }
    }
    return bins;
  }
}
