// A prompt and the hot prompts that begin as it does: what they share, where that is, and where they go apart.

import { ask } from "../api.js";
import { count, short } from "../format.js";
import { Empty } from "../ui.js";
import { html, useEffect, useState } from "../vendor/preact.js";

export function Tree({ app, prompt, tiers }) {
  const [tree, setTree] = useState(null);
  const [problem, setProblem] = useState("");
  useEffect(() => void ask("v1/tree", prompt).then(setTree, (error) => setProblem(error.message)), []);
  if (problem) return html`<${Empty}>${problem}<//>`;
  if (!tree?.root) return null;
  const depth = deepest(tree.root);
  return html`<section class="tree" aria-label="Prompts that begin alike">
    <h3>Prompts that begin alike</h3>
    ${tree.root.prompts > 1
      ? html`<ul><${Branch} app=${app} branch=${tree.root} depth=${depth} tiers=${tiers} per=${tree.block_tokens} /></ul>`
      : html`<${Empty}>None of the ${count(tree.compared)} hot prompts of this model begins as this one does.<//>`}
  </section>`;
}

function Branch({ app, branch, depth, tiers, per }) {
  const { start, end, held, prompts, asked, ends, children } = branch;
  const blocks = end - start;
  return html`<li class=${asked ? "asked" : ""} data-branch=${branch.key}>
    <div class="line">
      <span class="bar" aria-hidden="true"><i style=${{ marginLeft: `${(100 * start) / depth}%`, width: `${(100 * blocks) / depth}%` }}></i></span>
      <span class="blocks">${start === end - 1 ? `block ${start}` : `blocks ${start} – ${end - 1}`}</span>
      <span class="dim small">${count(blocks * per)} tokens</span>
      <span class="tiers">${tiers.filter((tier) => held[tier]).map((tier) => html`<span class=${`tier ${tier}`}>${tier}${held[tier] < blocks ? ` ${count(held[tier])}` : ""}</span>`)}${tiers.some((tier) => held[tier]) ? "" : html`<span class="dim small">nowhere</span>`}</span>
      <span class="right small dim">${prompts > 1 ? `${count(prompts)} prompts` : ""} ${ends.map((key) => (asked && !children.some((child) => child.asked) ? html`<b>this prompt</b>` : html`<button type="button" class="link mono" onClick=${() => app.openPrompt(key)} aria-label=${`Open prompt ${short(key)}`}>${short(key)}</button>`))}</span>
    </div>
    ${children.length > 0 && html`<ul>${children.map((child) => html`<${Branch} key=${child.key} app=${app} branch=${child} depth=${depth} tiers=${tiers} per=${per} />`)}</ul>`}
  </li>`;
}

const deepest = (branch) => Math.max(branch.end, ...branch.children.map(deepest));
