// A picture that is too large to be answered at once: sent as a job, followed, and its labels offered as a file.

import { $ } from "./elements.js";
import { ask, queryOf } from "./protocol.js";

const POLL_MS = 700;
const BUSY = [429, 502, 503, 504], BUSY_S = 5, PATIENCE_S = 120; // a server that is full, not ready or away is asked again, for so long

/** Whether a job runs, or its result waits to be taken. */
export const hasJob = () => $("job").disabled || !$("job-result").hidden;

/** say: shows a sentence. Ends when the job does, or is cancelled. */
export async function runJob({ picture, request, say }) {
  say("Sending …");
  $("job").disabled = true;
  $("job-result").hidden = true;
  const end = new AbortController();
  try {
    const sent = await ask(`jobs?${queryOf(request)}`, {
      method: "POST", body: picture, headers: { "Content-Type": picture.type || "application/octet-stream", Accept: "image/png" },
    });
    const { id } = await sent.json();
    $("job-cancel").onclick = () => {
      end.abort();
      ask(`jobs/${id}`, { method: "DELETE" }).then(() => say("Cancelled."), (error) => say(error.message, true));
    };
    $("progress").hidden = $("job-cancel").hidden = false;
    await watch(id, { picture, say, signal: end.signal });
  } catch (error) {
    if (!end.signal.aborted) throw error;
  } finally {
    $("progress").hidden = $("job-cancel").hidden = true;
    $("job").disabled = false;
  }
}

/** Shows how a job goes, and offers its result. */
async function watch(id, { picture, say, signal }) {
  for (let job = {}; job.state !== "done" && job.state !== "failed"; await pause(POLL_MS, signal)) {
    job = await askPatiently(`jobs/${id}`, "json", signal);
    $("progress").value = job.percent;
    if (job.state === "failed") say(job.error, true);
    else say(`Job ${job.state}: ${job.percent} %, ${job.windows_done} of ${job.windows || "?"} windows`);
    if (job.state === "done") offer(await askPatiently(`jobs/${id}/result`, "blob", signal), picture.name || "picture");
  }
}

async function askPatiently(path, kind, signal) {
  for (let left_s = PATIENCE_S; ;) {
    try {
      return await (await ask(path, { signal }))[kind]();
    } catch (error) {
      const wait_s = Math.max(1, error.wait_s ?? BUSY_S), isAway = error instanceof TypeError; // a job outlasts its server's restart
      if (!(isAway || BUSY.includes(error.status)) || wait_s > left_s) throw error;
      await pause(1000 * wait_s, signal);
      left_s -= wait_s;
    }
  }
}

function pause(ms, signal) {
  return new Promise((resume) => {
    const end = () => resume(signal.removeEventListener("abort", end));
    setTimeout(end, ms);
    signal.addEventListener("abort", end);
  });
}

function offer(result, name) {
  URL.revokeObjectURL($("job-result").href);
  Object.assign($("job-result"), { href: URL.createObjectURL(result), textContent: `Download the labels of ${name}`, hidden: false });
}
