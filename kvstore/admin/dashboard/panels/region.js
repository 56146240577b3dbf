// Other regions, and the nodes of this one.

import { get, post } from "../api.js";
import { ago, bytes, count, money, seconds } from "../format.js";
import { Badge, Empty, Panel, Table } from "../ui.js";
import { html, useEffect, useState } from "../vendor/preact.js";

const LATE_SECONDS = 900;

export function Regions({ app }) {
  const [topology, setTopology] = useState(null);
  const replication = app.parts.replication;
  const there = Boolean(replication);
  useEffect(() => {
    if (there) get("v1/replication/topology").then(setTopology, () => setTopology(null));
  }, [there]);
  if (!replication) return html`<${Panel} title="Regions" name="regions" wide><${Empty}>${app.snapshot.problems.replication}<//><//>`;
  const steer = async (verb, source) => {
    try {
      await post(`v1/replication/${verb}`, { sources: [source] });
      app.say(`${source}: ${verb}d`);
    } catch (error) {
      app.say(error.message);
    }
  };
  const from = Object.entries(replication.sources);
  const rows = from.map(([name, source]) => ({
    key: name,
    cells: [
      html`${name} <span class="dim">→ ${replication.region}</span>`,
      html`<${Link} source=${source} />`,
      source.lag_seconds == null ? "never level" : seconds(source.lag_seconds),
      count(source.blocks),
      bytes(source.month_bytes),
      money(source.month_cost),
      html`<button type="button" class="small" disabled=${!app.can("operator")} onClick=${() => steer(source.paused ? "resume" : "pause", name)} aria-label=${`${source.paused ? "Resume" : "Pause"} ${name}`}>${source.paused ? "Resume" : "Pause"}</button>`,
    ],
  }));
  const { manifest } = replication;
  const to = topology?.flows.filter((flow) => flow.source === replication.region).flatMap((flow) => flow.to) ?? [];
  return html`<${Panel} title="Regions" name="regions" wide aside=${html`<${Badge}>${replication.mode}<//>`}>
    <${Table} caption="Links from other regions" columns=${["Link", "State", ">Lag", ">Blocks", ">This month", ">Cost", ">~Pause or resume"]} rows=${rows} empty="No other region flows into this one." />
    <p class="small dim foot">
      ${manifest ? `Publishes ${count(manifest.blocks)} blocks, ${bytes(manifest.bytes)}, ${ago(manifest.published, app.now)}` : "Has not published a manifest yet"}${to.length ? ` to ${[...new Set(to)].join(", ")}` : ""}.
      ${Object.entries(replication.leases).map(([duty, lease]) => ` ${duty}: ${lease.held ? lease.holder : "nobody"}.`)}
    </p>
  <//>`;
}

function Link({ source }) {
  if (source.paused) return html`<span title=${source.paused}><${Badge} kind="warn">paused<//></span>`;
  if (source.problem) return html`<span title=${source.problem}><${Badge} kind="bad">failing<//></span> <span class="small">${source.problem}</span>`;
  if (source.lag_seconds == null || source.lag_seconds > LATE_SECONDS) return html`<${Badge} kind="warn">behind<//>`;
  return html`<${Badge} kind="good">level<//>`;
}

export function Nodes({ app }) {
  const nodes = app.parts.nodes ?? [];
  const clients = app.node?.clients ?? [];
  const problem = app.snapshot.problems.nodes;
  const rows = nodes.map((node) => ({
    key: node.name,
    cells: [
      html`<span class="clip" title=${node.name}>${node.name}</span>`,
      node.here ? html`<${Badge} kind="good">here<//>` : "",
      node.expires ? (node.expires > app.now ? "heard of lately" : html`<${Badge} kind="bad">gone<//>`) : "",
    ],
  }));
  const engines = clients.filter((client) => client.name !== "admin API");
  return html`<${Panel} title="Nodes and clients" name="nodes">
    ${problem && !app.snapshot.problems.node && html`<p class="small problem">${problem}</p>`}
    <${Table} caption="Nodes of the region" columns=${["Node", "~Where", "~State"]} rows=${rows} empty="No node is known." />
    ${app.node && html`<${Table}
      caption="Clients of the node here"
      columns=${["Client", ">Leases", ">Connected"]}
      rows=${engines.map((client, at) => ({ key: `${client.pid} ${at}`, cells: [html`<span class="clip" title=${`pid ${client.pid}`}>${client.name}</span>`, count(client.leases), seconds(client.connected_seconds)] }))}
      empty="No engine is connected."
    />`}
  <//>`;
}
