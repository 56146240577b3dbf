// The figures that say how the night is going.

import { bytes, count, percent, seconds } from "../format.js";
import { TIERS, counter, total } from "../samples.js";
import { html, useState } from "../vendor/preact.js";

const LATELY = 300;
const GPUS = "kvstore-gpus";

export function Tiles({ app }) {
  return html`<section class="tiles" aria-label="At a glance">
    <${HitRatio} app=${app} /><${Saved} app=${app} /><${Served} app=${app} /><${Stored} app=${app} /><${Warmth} app=${app} />
  </section>`;
}

function Tile({ name, title, value, note }) {
  return html`<article class="tile" data-tile=${name}><h2>${title}</h2><p class="value">${value}</p><p class="note">${note}</p></article>`;
}

function HitRatio({ app: { node, samples } }) {
  const everAsked = counter(node, "asked_tokens");
  const ever = everAsked ? total(node, "found_tokens") / everAsked : null;
  const asked = samples.growth("asked", LATELY)?.by ?? 0;
  const lately = asked ? TIERS.reduce((sum, tier) => sum + samples.growth(`found ${tier}`, LATELY).by, 0) / asked : null;
  const note = everAsked ? `of tokens; ${percent(ever)} in all` : "nobody asked for a prompt yet";
  return html`<${Tile} name="hits" title="Hit ratio, 5 min" value=${percent(lately ?? ever)} note=${lately === null && everAsked ? `${note}; idle now` : note} />`;
}

/** Engines report how fast they compute; what that is in GPU-hours depends on how many GPUs compute a prompt together. */
function Saved({ app: { node, samples } }) {
  const [gpus, setGpus] = useState(() => Number(localStorage.getItem(GPUS)) || 1);
  const spared = counter(node, "spared_prefill_seconds");
  const lately = samples.growth("spared", LATELY)?.by;
  const change = (event) => {
    const wanted = Math.max(1, Math.round(Number(event.target.value)) || 1);
    localStorage.setItem(GPUS, wanted);
    setGpus(wanted);
  };
  const note = !spared
    ? counter(node, "offered_tokens") ? "no engine has reported its speed yet" : "nothing was loaded yet"
    : html`${gpuHours((spared * gpus) / 3600)} at${" "}
        <input class="tiny" type="number" min="1" max="1024" value=${gpus} onChange=${change} aria-label="GPUs of an engine" />${" "}
        ${gpus === 1 ? "GPU" : "GPUs"}`;
  const value = html`${seconds(spared)}${lately ? html`<small>${seconds(lately)} in 5 min</small>` : ""}`;
  return html`<${Tile} name="saved" title="Prefill saved" value=${value} note=${note} />`;
}

function Served({ app: { node, samples } }) {
  return html`<${Tile} name="served" title="Blocks served" value=${perSecond(samples.rate("delivered"))} note=${`${count(total(node, "delivered_blocks"))} in all`} />`;
}

function Stored({ app: { node, samples } }) {
  const queued = node.tiers.reduce((sum, tier) => sum + tier.queued_bytes, 0);
  return html`<${Tile} name="stored" title="Blocks saved" value=${perSecond(samples.rate("published"))} note=${`${count(counter(node, "published_blocks"))} in all${queued ? ` · ${bytes(queued)} waiting` : ""}`} />`;
}

function Warmth({ app: { parts } }) {
  const warmth = parts.warmth;
  if (!warmth) return html`<${Tile} name="warmth" title="Warm-up" value="–" note="this node was never warmed" />`;
  const note = warmth.problem || `${warmth.state} · ${bytes(warmth.warm_bytes)} of ${bytes(warmth.planned_bytes)}`;
  return html`<${Tile} name="warmth" title="Warm-up" value=${percent(warmth.share)} note=${note} />`;
}

const gpuHours = (hours) => `${hours < 0.01 ? hours.toFixed(4) : hours < 10 ? hours.toFixed(2) : count(hours)} GPU-h`;

const perSecond = (value) => (value == null ? "–" : html`${count(value)}<small>/s</small>`);
