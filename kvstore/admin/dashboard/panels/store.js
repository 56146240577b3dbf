// The tiers: how full, how fast, and whether they answer.

import { bytes, count, percent, rate } from "../format.js";
import { breakerOf } from "../samples.js";
import { Badge, Meter, Panel } from "../ui.js";
import { html } from "../vendor/preact.js";

export function Store({ app: { node, samples } }) {
  return html`<${Panel} title="Tiers" name="tiers">
    <ul class="store">${node.tiers.map((tier) => html`<${Tier} key=${tier.medium} tier=${tier} breaker=${breakerOf(node, tier.medium)} samples=${samples} />`)}</ul>
  <//>`;
}

function Tier({ tier, breaker, samples }) {
  const { medium, capacity_bytes: capacity, used_bytes: used } = tier;
  const read = samples.rate(`get ${medium}`);
  const written = samples.rate(`put ${medium}`);
  const notes = [
    `${count(tier.blocks)} blocks`,
    tier.queued_bytes ? `${bytes(tier.queued_bytes)} waiting` : "",
    tier.evicted ? `${count(tier.evicted)} evicted` : "",
    tier.refused ? `${count(tier.refused)} refused` : "",
  ].filter(Boolean);
  return html`<li data-tier=${medium}>
    <div class="line">
      <span class=${`tier ${medium}`}>${medium}</span>
      ${breaker !== "closed" && html`<${Badge} kind="bad">${breaker === "open" ? "does not answer" : "is tried again"}<//>`}
      ${tier.quarantined > 0 && html`<${Badge} kind="warn">${count(tier.quarantined)} bad<//>`}
      <span class="fillup">${bytes(used)}${capacity ? html` <span class="dim">of ${bytes(capacity)}</span> ${percent(used / capacity)}` : ""}</span>
    </div>
    ${capacity ? html`<${Meter} value=${used / capacity} tier=${medium} label=${`${medium} is filled`} />` : html`<div class="meter open"></div>`}
    <div class="line small dim">
      <span>${notes.join(" · ")}</span>
      ${medium !== "host" && html`<span class="right">read ${rate(read)} · write ${rate(written)}</span>`}
    </div>
  </li>`;
}
