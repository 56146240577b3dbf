// One prompt: its chain by tier, what happened to each block, and what can be done with it.

import { ask, post } from "../api.js";
import { ago, clock, count, seconds, short } from "../format.js";
import { Chain } from "../panels/chain.js";
import { Tree } from "../panels/tree.js";
import { TIERS } from "../samples.js";
import { ConfirmByName, Dialog, Empty, Problem, Table, Tiers, useAction } from "../ui.js";
import { describe, everywhere } from "./purge.js";
import { html, useEffect, useId, useState } from "../vendor/preact.js";

const WHY = {
  not_written: "not written down",
  other_namespace: "stored in another namespace",
  recompute_preferred: "computing was faster",
  deadline: "came too late",
  withheld: "elsewhere, and not offered now",
};
const words = (why) => WHY[why] ?? why.replaceAll("_", " ");
const DURATIONS = { "1 hour": 3600, "8 hours": 8 * 3600, "24 hours": 24 * 3600 };

export function PromptDialog({ app, prompt, onClose }) {
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState("");
  const [deleting, setDeleting] = useState(false);
  const look = () => ask("v1/explain", prompt).then((answer) => (setFound(answer), setProblem("")), (error) => setProblem(error.message));
  useEffect(() => void look(), []);
  const last = found?.blocks.at(-1);
  if (deleting) {
    const act = async () => {
      const { deleted } = await post("v1/blocks/delete", { prompt });
      app.say(`Deleted ${describe(deleted)}`);
      onClose();
    };
    return html`<${ConfirmByName} title="Delete this prompt" name=${short(last.key)} label="Delete" act=${act} onClose=${() => setDeleting(false)}>
      <p>Deletes its ${count(found.blocks.length)} blocks from ${everywhere(app.node)}. Other prompts that begin alike lose them, too.</p>
    <//>`;
  }
  return html`<${Dialog} title=${title(prompt, found)} onClose=${onClose} size="large">
    ${problem && html`<${Problem}>${problem}<//>`}
    ${!found && !problem && html`<${Empty}>Looking…<//>`}
    ${found && html`<${Facts} app=${app} found=${found} />`}
    ${last && html`<${Blocks} app=${app} found=${found} prompt=${prompt} /><${Actions} app=${app} prompt=${prompt} last=${last} look=${look} onDelete=${() => setDeleting(true)} />`}
  <//>`;
}

function title(prompt, found) {
  if (prompt.request) return `Request ${found?.request ?? prompt.request}`;
  if (prompt.key) return `Prompt ${short(prompt.key)}`;
  return "Prompt";
}

function Facts({ app, found }) {
  const { block_tokens: per, blocks, usable_blocks: usable } = found;
  const facts = [
    ["Model", found.fields.model ?? "unknown here"],
    ["Tokens", `${count(found.tokens)} in ${count(found.chain_blocks)} blocks of ${per}`],
    ["Usable now", html`<b>${count(usable * per)}</b> tokens, ${count(usable)} of ${count(blocks.length)} blocks`],
    found.asked_at && ["Asked", `${ago(found.asked_at, app.now)} by ${found.client}`],
    found.found && ["Then", `${count(found.found[0])} blocks in the engine, ${count(found.found[1])} found here`],
    found.elsewhere.length > 0 && ["Elsewhere", found.elsewhere.map((other) => `${count(other.tokens)} tokens in ${short(other.namespace)}, which differs in ${Object.keys(other.differs).join(", ")}`).join("; ")],
  ].filter(Boolean);
  return html`<dl class="facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

/** What other regions have of these blocks, where this one has others. */
function useRegions(app, blocks) {
  const [regions, setRegions] = useState([]);
  const linked = Boolean(app.parts.replication);
  useEffect(() => {
    if (!linked) return;
    const keys = blocks.map((block) => block.key).join("");
    const here = app.parts.replication.region;
    ask("v1/replication/holdings", { keys }).then((found) => setRegions(found.filter((one) => one.region !== here)), () => setRegions([]));
  }, [linked]);
  return regions;
}

function Blocks({ app, found, prompt }) {
  const firstMissed = found.blocks.findIndex((block) => block.why !== "held");
  const [at, select] = useState(Math.max(firstMissed, 0));
  const block = found.blocks[Math.min(at, found.blocks.length - 1)];
  const tiers = app.node?.tiers.map((tier) => tier.medium) ?? TIERS;
  const regions = useRegions(app, found.blocks);
  return html`
    <${Chain} blocks=${found.blocks} tiers=${tiers} regions=${regions} at=${at} onSelect=${select} />
    ${regions.length > 0 && html`<p class="small dim regions">${regions.map((one) => `${one.region} has published ${count(one.blocks)} of ${count(found.blocks.length)} blocks, ${ago(one.published, app.now)}`).join(" · ")}</p>`}
    <div class="block" aria-live="polite">
      <div class="line"><b>Block ${block.index}</b><code>${block.key}</code><${Tiers} media=${block.where} /></div>
      <p class=${block.why === "held" ? "dim" : "why"}>${words(block.why)}${block.detail && block.detail !== block.why ? `: ${block.detail}` : ""}</p>
      <p class="small dim">${[
        `${count(block.sightings)} requests asked for it`,
        block.chance_within_hour != null && `${Math.round(block.chance_within_hour * 100)}% likely within the hour`,
        block.pinned_until && `pinned, ends ${ago(block.pinned_until, app.now)}`,
      ].filter(Boolean).join(" · ")}</p>
      ${block.events.length > 0 && html`<details><summary>What happened to it</summary><ol class="events">${block.events.map((event) => html`<li><time>${clock(event.at)}</time> ${event.text}</li>`)}</ol></details>`}
    </div>
    <${Table} caption="Blocks that are alike, in a row" columns=${["Blocks", "Where", "Why"]} rows=${runs(found.blocks).map(asRow)} empty="" />
    <${Tree} app=${app} prompt=${prompt} tiers=${tiers} />
  `;
}

/** Neighbours with the same fate. */
export function runs(blocks) {
  const found = [];
  for (const block of blocks) {
    const run = found.at(-1);
    const fate = `${block.where} ${block.why}`;
    if (run?.fate === fate) run.end = block.index;
    else found.push({ fate, start: block.index, end: block.index, block });
  }
  return found;
}

const asRow = ({ start, end, block }) => ({
  key: start,
  cells: [
    start === end ? `${start}` : `${start} – ${end}`,
    html`<${Tiers} media=${block.where} />`,
    block.why === "held" ? html`<span class="dim">held</span>` : html`<b>${words(block.why)}</b> <span class="dim small">${block.detail}</span>`,
  ],
});

function Actions({ app, prompt, last, look, onDelete }) {
  const [duration, setDuration] = useState("1 hour");
  const id = useId();
  const pin = useAction(async () => {
    const pinned = await post("v1/pins", { prompt, seconds: DURATIONS[duration] });
    app.say(`Pinned ${count(pinned.pinned)} blocks for ${seconds(DURATIONS[duration])}`);
    await look();
  });
  const verify = useAction(async () => {
    const { tiers } = await post(`v1/blocks/${last.key}/verify`);
    const bad = tiers.filter((tier) => !tier.ok);
    app.say(bad.length ? `Bad in ${bad.map((tier) => tier.tier).join(", ")}: dropped` : `Block ${last.index} is well in ${tiers.map((tier) => tier.tier).join(", ")}`);
    await look();
  });
  const problem = pin.problem || verify.problem;
  return html`${problem && html`<${Problem}>${problem}<//>`}
    <div class="actions">
      <label for=${id} class="unseen">Pin for</label>
      <select id=${id} value=${duration} onChange=${(event) => setDuration(event.target.value)}>${Object.keys(DURATIONS).map((name) => html`<option>${name}</option>`)}</select>
      <button type="button" class="main" disabled=${pin.busy || !app.can("operator")} onClick=${() => pin.run()}>Pin</button>
      <button type="button" disabled=${verify.busy || !last.where.length || !app.can("operator")} onClick=${() => verify.run()}>Verify the last block</button>
      <span class="grow"></span>
      <button type="button" class="danger" disabled=${!app.can("admin")} onClick=${onDelete}>Delete…</button>
    </div>`;
}
