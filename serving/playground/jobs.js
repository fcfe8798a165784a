// A picture that is too large to be answered at once: sent as a job, followed, and its labels offered as a file.

const POLL_MS = 700;
const END = { done: true, failed: true };

/** $: element by id. ask: fetch that throws refusals. say: shows a sentence. Ends when the job does, or is cancelled. */
export async function runJob($, { picture, model, options, prompt, ask, say }) {
  const told = Object.entries(prompt).map(([name, rows]) => [name, JSON.stringify(rows)]);
  const query = new URLSearchParams({ model, ...options, ...Object.fromEntries(told) });
  say("Sending …");
  const sent = await ask(`jobs?${query}`, {
    method: "POST", body: picture, headers: { "Content-Type": picture.type || "application/octet-stream", Accept: "image/png" },
  });
  const { id } = await sent.json();
  let cancelled = false;
  $("job-cancel").onclick = () => {
    cancelled = true;
    ask(`jobs/${id}`, { method: "DELETE" }).then(() => say("Cancelled."), (error) => say(error.message, true));
  };
  const shown = (isRunning) => {
    $("progress").hidden = $("job-cancel").hidden = !isRunning;
    $("job").disabled = isRunning;
  };
  $("job-result").hidden = true;
  shown(true);
  try {
    for (let job = {}; !END[job.state]; await new Promise((resume) => setTimeout(resume, POLL_MS))) {
      if (cancelled) return;
      job = await (await ask(`jobs/${id}`)).json();
      $("progress").value = job.percent;
      if (job.state === "failed") say(job.error, true);
      else say(`Job ${job.state}: ${job.percent} %, ${job.windows_done} of ${job.windows || "?"} windows`);
      if (job.state === "done") await offer($, id, ask);
    }
  } catch (error) {
    if (!cancelled) throw error;
  } finally {
    shown(false);
  }
}

async function offer($, id, ask) {
  const result = await (await ask(`jobs/${id}/result`)).blob();
  URL.revokeObjectURL($("job-result").href);
  $("job-result").href = URL.createObjectURL(result);
  $("job-result").hidden = false;
}
