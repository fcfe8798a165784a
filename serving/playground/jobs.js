// A picture that is too large to be answered at once: sent as a job, followed, and its labels offered as a file.

import { $ } from "./elements.js";
import { ask, queryOf } from "./protocol.js";

const POLL_MS = 700;

/** say: shows a sentence. Ends when the job does, or is cancelled. */
export async function runJob({ picture, request, say }) {
  say("Sending …");
  const sent = await ask(`jobs?${queryOf(request)}`, {
    method: "POST", body: picture, headers: { "Content-Type": picture.type || "application/octet-stream", Accept: "image/png" },
  });
  const { id } = await sent.json();
  let cancelled = false;
  $("job-cancel").onclick = () => {
    cancelled = true;
    ask(`jobs/${id}`, { method: "DELETE" }).then(() => say("Cancelled."), (error) => say(error.message, true));
  };
  $("job-result").hidden = true;
  showRunning(true);
  try {
    for (let job = {}; job.state !== "done" && job.state !== "failed"; await new Promise((resume) => setTimeout(resume, POLL_MS))) {
      if (cancelled) return;
      job = await (await ask(`jobs/${id}`)).json();
      $("progress").value = job.percent;
      if (job.state === "failed") say(job.error, true);
      else say(`Job ${job.state}: ${job.percent} %, ${job.windows_done} of ${job.windows || "?"} windows`);
      if (job.state === "done") offer(await (await ask(`jobs/${id}/result`)).blob());
    }
  } catch (error) {
    if (!cancelled) throw error;
  } finally {
    showRunning(false);
  }
}

function showRunning(isRunning) {
  $("progress").hidden = $("job-cancel").hidden = !isRunning;
  $("job").disabled = isRunning;
}

function offer(result) {
  URL.revokeObjectURL($("job-result").href);
  $("job-result").href = URL.createObjectURL(result);
  $("job-result").hidden = false;
}
