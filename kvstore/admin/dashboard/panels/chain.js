// The chain of a prompt as one strip a tier, and one another region: coloured where it holds the block.

import { html } from "../vendor/preact.js";

const WIDTH = 1000;

export function Chain({ blocks, tiers, regions, at, onSelect }) {
  const step = WIDTH / blocks.length;
  const strips = [
    ...tiers.map((tier) => ({ name: tier, kind: tier, parts: stretches(blocks, tier) })),
    ...regions.map(({ region, runs }) => ({ name: region, kind: "region", parts: spread(runs, blocks.length) })),
  ];
  const move = (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 32, PageDown: at + 32, Home: 0, End: blocks.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    onSelect(Math.min(Math.max(to, 0), blocks.length - 1));
  };
  const point = (event) => {
    const { left, width } = event.currentTarget.getBoundingClientRect();
    onSelect(Math.min(Math.max(Math.floor(((event.clientX - left) / width) * blocks.length), 0), blocks.length - 1));
  };
  const block = blocks[at];
  return html`<div class="chain">
    <div class="names" aria-hidden="true">${strips.map(({ name, kind }) => html`<span class=${kind === "region" ? "region" : ""} title=${kind === "region" ? `region ${name}` : ""}>${name}</span>`)}</div>
    <div class="strips" tabindex="0" role="slider" aria-label="Block" aria-valuemin="0" aria-valuemax=${blocks.length - 1} aria-valuenow=${at}
      aria-valuetext=${`block ${block.index}, ${block.where.length ? `in ${block.where.join(", ")}` : "in no tier"}`} onKeyDown=${move} onClick=${point}>
      ${strips.map(({ kind, parts }) => html`<svg viewBox=${`0 0 ${WIDTH} 10`} preserveAspectRatio="none" aria-hidden="true">
        ${parts.map(([start, end, held]) => html`<rect class=${held ? `fill ${kind}` : "miss"} x=${start * step} width=${(end - start) * step} y="0" height="10" />`)}
        ${blocks.length <= 128 && blocks.slice(1).map((_, before) => html`<line class="cut" x1=${(before + 1) * step} x2=${(before + 1) * step} y1="0" y2="10" />`)}
      </svg>`)}
      <i class="cursor" style=${{ left: `${((at + 0.5) / blocks.length) * 100}%` }}></i>
    </div>
  </div>`;
}

/** The same from what is held: runs of `[start, end]` among `count` blocks. */
export function spread(runs, count) {
  const found = [];
  let at = 0;
  for (const [start, end] of [...runs, [count, count]]) {
    if (start > at) found.push([at, Math.min(start, count), false]);
    if (end > start) found.push([start, Math.min(end, count), true]);
    at = end;
  }
  return found;
}

/** `[start, end, held]` of neighbours that the tier holds, or lacks. */
export function stretches(blocks, tier) {
  const found = [];
  blocks.forEach((block, at) => {
    const held = block.where.includes(tier);
    if (found.at(-1)?.[2] === held) found.at(-1)[1] = at + 1;
    else found.push([at, at + 1, held]);
  });
  return found;
}
