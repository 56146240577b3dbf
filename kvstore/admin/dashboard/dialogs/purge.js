import { call, get, post } from "../api.js";
import { count } from "../format.js";
import { TIERS } from "../samples.js";
import { ConfirmByName } from "../ui.js";
import { html, useEffect, useState } from "../vendor/preact.js";

/** Delete every block of a namespace: here, or for good and everywhere where the API offers that as a job. */
export function PurgeDialog({ app, space, onClose }) {
  const { model } = space.fields;
  const [offered, setOffered] = useState(false);
  const [everywhereElse, setEverywhereElse] = useState(false);
  useEffect(() => void get("v1/job-kinds").then((kinds) => setOffered(kinds.some((kind) => kind.name === "purge")), () => setOffered(false)), []);
  const act = async () => {
    if (everywhereElse) {
      await post("v1/jobs", { kind: "purge", options: { namespace: space.digest } });
      app.say(`Purging ${model} everywhere: see the jobs`);
      return;
    }
    const { deleted } = await call("DELETE", `v1/namespaces/${space.digest}/blocks`);
    app.say(`Purged ${model}: ${describe(deleted)}`);
  };
  return html`<${ConfirmByName} title=${`Purge ${model}`} name=${model} label="Purge" act=${act} onClose=${onClose}>
    <p>Deletes every block of <b>${model}</b> (<code>${space.digest.slice(0, 8)}</code>) from ${everywhere(app.node)}. Engines compute these prompts anew. This cannot be undone.</p>
    ${offered && html`<label class="check"><input type="checkbox" checked=${everywhereElse} onChange=${(event) => setEverywhereElse(event.target.checked)} /> On every node and in every region, for good</label>`}
  <//>`;
}

/** Where a deletion reaches. */
export const everywhere = (node) =>
  node.tiers.some((tier) => tier.medium === "object") ? "this node's memory and disk and from the region's bucket" : "this node's memory and disk";

/** What `deleted` of an answer says. */
export const describe = (deleted) =>
  TIERS.filter((tier) => deleted[tier]).map((tier) => `${count(deleted[tier])} blocks from ${tier}`).join(", ") || "no tier held a block";
