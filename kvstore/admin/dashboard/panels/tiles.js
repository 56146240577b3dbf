// The figures that say how the night is going.

import { bytes, count, percent, seconds } from "../format.js";
import { TIERS, counter, total } from "../samples.js";
import { html } from "../vendor/preact.js";

const LATELY = 300;

export function Tiles({ app }) {
  return html`<section class="tiles" aria-label="At a glance">
    <${HitRatio} app=${app} /><${Saved} app=${app} /><${Served} app=${app} /><${Stored} app=${app} /><${Warmth} app=${app} />
  </section>`;
}

function Tile({ name, title, value, note }) {
  return html`<article class="tile" data-tile=${name}><h2>${title}</h2><p class="value">${value}</p><p class="note">${note}</p></article>`;
}

function HitRatio({ app: { node, samples } }) {
  const found = TIERS.map((tier) => counter(node, "found_blocks", { tier }));
  const looked = counter(node, "looked_up_blocks");
  const ever = looked ? found.reduce((sum, value) => sum + value, 0) / looked : null;
  const asked = samples.growth("looked", LATELY)?.by ?? 0;
  const lately = asked ? TIERS.reduce((sum, tier) => sum + samples.growth(`found ${tier}`, LATELY).by, 0) / asked : null;
  const note = looked ? `${percent(ever)} since the node started` : "nothing was looked up yet";
  return html`<${Tile} name="hits" title="Hit ratio, 5 min" value=${percent(lately ?? ever)} note=${lately === null && looked ? `${note}; idle now` : note} />`;
}

function Saved({ app: { node, samples } }) {
  const saved = counter(node, "prefill_saved_seconds");
  const lately = samples.growth("saved", LATELY)?.by;
  const hours = saved / 3600;
  const value = hours >= 0.1 ? `${hours >= 100 ? count(hours) : hours.toFixed(1)} GPU-h` : seconds(saved);
  const parts = [hours >= 0.1 ? `${count(saved)} s of prefill` : `of prefill, ${hours < 0.001 && saved ? "<0.001" : hours.toFixed(3)} GPU-h`, lately ? `${seconds(lately)} in the last 5 min` : "since the node started"];
  return html`<${Tile} name="saved" title="Prefill saved" value=${value} note=${parts.join(" · ")} />`;
}

function Served({ app: { node, samples } }) {
  return html`<${Tile} name="served" title="Blocks served" value=${perSecond(samples.rate("delivered"))} note=${`${count(total(node, "delivered_blocks"))} since the node started`} />`;
}

function Stored({ app: { node, samples } }) {
  const queued = node.tiers.reduce((sum, tier) => sum + tier.queued_bytes, 0);
  return html`<${Tile} name="stored" title="Blocks saved" value=${perSecond(samples.rate("published"))} note=${`${count(counter(node, "published_blocks"))} since the node started${queued ? ` · ${bytes(queued)} waiting` : ""}`} />`;
}

function Warmth({ app: { parts } }) {
  const warmth = parts.warmth;
  if (!warmth) return html`<${Tile} name="warmth" title="Warm-up" value="–" note="this node was never warmed" />`;
  const note = warmth.problem || `${warmth.state} · ${bytes(warmth.warm_bytes)} of ${bytes(warmth.planned_bytes)}`;
  return html`<${Tile} name="warmth" title="Warm-up" value=${percent(warmth.share)} note=${note} />`;
}

const perSecond = (value) => (value == null ? "–" : html`${count(value)}<small>/s</small>`);
