// Hit ratio by tier over time, as stacked columns.

import { clock, count, percent } from "../format.js";
import { Panel } from "../ui.js";
import { html, useState } from "../vendor/preact.js";

const COLUMNS = 60;
const SPANS = { "5 min": 5, "15 min": 15, "1 h": 60 };
const WIDTH = 600;
const HEIGHT = 150;

export function Chart({ app: { node, samples } }) {
  const [span, setSpan] = useState("5 min");
  const bins = samples.lookups(SPANS[span], COLUMNS);
  const tiers = node.tiers.map((tier) => tier.medium);
  const choice = html`<div role="group" aria-label="Span of time" class="choice">
    ${Object.keys(SPANS).map((name) => html`<button type="button" aria-pressed=${name === span} onClick=${() => setSpan(name)}>${name}</button>`)}
  </div>`;
  return html`<${Panel} title="Hit ratio by tier" name="chart" wide aside=${choice}>
    <div class="plot">
      <div class="scale" aria-hidden="true"><span>100%</span><span>50%</span><span>0%</span></div>
      <${Columns} bins=${bins} tiers=${tiers} />
    </div>
    <div class="axis"><span>${clock(bins[0].start).slice(0, 5)}</span><${Legend} bins=${bins} tiers=${tiers} /><span>now</span></div>
  <//>`;
}

function Columns({ bins, tiers }) {
  const step = WIDTH / bins.length;
  return html`<svg class="chart" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label=${summary(bins, tiers)}>
    ${[0.25, 0.5, 0.75, 1].map((part) => html`<line class="rule" x1="0" x2=${WIDTH} y1=${HEIGHT * (1 - part)} y2=${HEIGHT * (1 - part)} />`)}
    ${bins.map((bin, at) => html`<${Column} key=${bin.start} bin=${bin} tiers=${tiers} x=${at * step} width=${step - 1.5} />`)}
  </svg>`;
}

function Column({ bin, tiers, x, width }) {
  let top = HEIGHT;
  const parts = bin.asked
    ? tiers.map((tier) => {
        const height = (HEIGHT * bin.found[tier]) / bin.asked;
        top -= height;
        return html`<rect class=${`fill ${tier}`} x=${x} y=${top} width=${width} height=${height} />`;
      })
    : null;
  const title = bin.asked
    ? `${clock(bin.start)}: ${count(bin.asked)} tokens asked for; ${tiers.map((tier) => `${tier} ${percent(bin.found[tier] / bin.asked)}`).join(", ")}`
    : `${clock(bin.start)}: ${bin.seen ? "nobody asked" : "this page was not open"}`;
  const ground = bin.asked ? "miss" : bin.seen ? "idle" : "unknown";
  return html`<g><title>${title}</title><rect class=${ground} x=${x} y=${bin.asked ? 0 : HEIGHT - 2} width=${width} height=${bin.asked ? HEIGHT : 2} />${parts}</g>`;
}

function Legend({ bins, tiers }) {
  const asked = sum(bins, (bin) => bin.asked);
  return html`<ul class="legend">
    ${tiers.map((tier) => html`<li><i class=${`swatch ${tier}`}></i>${tier} ${asked ? percent(sum(bins, (bin) => bin.found[tier] ?? 0) / asked) : ""}</li>`)}
    <li><i class="swatch miss"></i>missed ${asked ? percent(1 - sum(bins, (bin) => tiers.reduce((all, tier) => all + (bin.found[tier] ?? 0), 0)) / asked) : ""}</li>
  </ul>`;
}

function summary(bins, tiers) {
  const asked = sum(bins, (bin) => bin.asked);
  if (!asked) return "Nobody asked for anything in this time.";
  const shares = tiers.map((tier) => `${tier} ${percent(sum(bins, (bin) => bin.found[tier] ?? 0) / asked)}`);
  return `Of ${count(asked)} tokens asked for, found in ${shares.join(", ")}.`;
}

const sum = (bins, of) => bins.reduce((all, bin) => all + of(bin), 0);
