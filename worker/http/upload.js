// Sends a file or a URL, follows its job, and opens the verdict.
(() => {
  "use strict";
  const at = (id) => document.getElementById(id);
  const LOOK_MS = 700;
  const STAGES = {
    queued: "Waiting for a worker",
    fetch: "Reading the upload",
    probe: "Checking the file",
    analyze: "Looking at faces",
    finish: "Writing the verdict",
  };
  const STATES = { cancelled: "Cancelled", expired: "Too late", quarantined: "Put aside" };
  let bearer = sessionStorage.getItem("ralf-token") || "";
  let after = null; // what to do once there is a token
  let job = "";
  let sending = null;

  const show = (name) => {
    for (const part of ["ask", "token-form", "running", "ended"]) at(part).hidden = part !== name;
  };

  const step = (words, percent, detail = "") => {
    at("step").textContent = words;
    at("detail").textContent = detail;
    if (percent === null) at("bar").removeAttribute("value");
    else at("bar").value = percent;
  };

  const begin = (subject) => {
    at("subject").textContent = subject;
    show("running");
  };

  const end = (title, words) => {
    job = "";
    history.replaceState(null, "", location.pathname);
    at("ended-title").textContent = title;
    at("ended-words").textContent = words;
    show("ended");
    at("again").focus();
  };

  const askForToken = (then) => {
    after = then;
    bearer = "";
    sessionStorage.removeItem("ralf-token");
    show("token-form");
    at("token").focus();
  };

  const headers = () => (bearer ? { Authorization: `Bearer ${bearer}` } : {});

  const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

  // XMLHttpRequest: fetch() does not say how much of an upload has gone.
  const send = (body, more, subject) => {
    begin(subject);
    step("Uploading", 0);
    const request = new XMLHttpRequest();
    sending = request;
    request.open("POST", "/jobs");
    request.responseType = "json";
    for (const [name, value] of Object.entries({ ...headers(), ...more })) {
      request.setRequestHeader(name, value);
    }
    request.upload.addEventListener("progress", (event) => {
      if (!event.lengthComputable) return;
      const gone = `${megabytes(event.loaded)} of ${megabytes(event.total)}`;
      step("Uploading", (100 * event.loaded) / event.total, gone);
    });
    request.addEventListener("load", () => {
      sending = null;
      const answer = request.response || {};
      if (request.status === 401) return askForToken(() => send(body, more, subject));
      if (request.status !== 202) {
        return end("Not accepted", answer.message || `The server answered ${request.status}.`);
      }
      job = answer.job_id;
      history.replaceState(null, "", `#job=${job}`);
      return follow();
    });
    request.addEventListener("error", () => {
      sending = null;
      end("Not sent", "The connection broke off. Is the server running?");
    });
    request.send(body);
  };

  const sendFile = (file) => {
    const form = new FormData();
    form.append("tag", file.name.slice(0, 256));
    form.append("file", file);
    send(form, {}, file.name);
  };

  const sendUrl = (url) => {
    // Without the query: that of a signed URL is a credential.
    const name = url.split(/[?#]/)[0].slice(0, 256);
    const body = JSON.stringify({ url, tag: name });
    send(body, { "Content-Type": "application/json" }, name);
  };

  const follow = async () => {
    const mine = job;
    while (job === mine) {
      let response, answer;
      try {
        response = await fetch(`/jobs/${mine}`, { headers: headers() });
        answer = await response.json();
      } catch {
        step("The server does not answer; trying again", null);
        await new Promise((resolve) => setTimeout(resolve, 3 * LOOK_MS));
        continue;
      }
      if (job !== mine) return;
      if (response.status === 401) return askForToken(() => (begin(""), follow()));
      if (response.status === 404) return end("No such job", answer.message);
      if (response.ok && shown(answer)) return;
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
    }
  };

  // Whether the job has ended.
  const shown = (answer) => {
    at("subject").textContent = answer.tag || `Job ${answer.job_id}`;
    if (answer.state === "succeeded") {
      step("Done", 100);
      // Back leads to an empty upload page, not again to this verdict.
      history.replaceState(null, "", location.pathname);
      location.assign(answer.links.page);
      return true;
    }
    if (answer.state !== "queued" && answer.state !== "running") {
      const words = answer.failure ? answer.failure.message : "";
      end(STATES[answer.state] || "No verdict", words);
      return true;
    }
    const seen = answer.progress;
    if (answer.state === "queued" || !seen) {
      const last = answer.last_failure;
      const again = last ? `Tried before (${last.message}); it is tried again` : "";
      step(STAGES.queued, null, again);
      return false;
    }
    const frames = seen.frames_total ? `${seen.frames_done} of ${seen.frames_total} frames` : "";
    const faces = seen.faces ? `, ${seen.faces} face${seen.faces === 1 ? "" : "s"}` : "";
    step(answer.cancelling ? "Cancelling" : STAGES[seen.stage], seen.percent, frames + faces);
    return false;
  };

  at("file").addEventListener("change", () => {
    const file = at("file").files[0];
    // Else choosing the same file again would change nothing, and nothing would happen.
    at("file").value = "";
    if (file) sendFile(file);
  });
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const url = at("url").value.trim();
    if (url) sendUrl(url);
    else at("url").focus();
  });
  at("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    bearer = at("token").value.trim();
    sessionStorage.setItem("ralf-token", bearer);
    at("token").value = "";
    const then = after;
    after = null;
    then();
  });
  at("cancel").addEventListener("click", () => {
    if (sending) {
      sending.abort();
      sending = null;
      end("Cancelled", "The upload was broken off; nothing of it is kept.");
    } else if (job) {
      fetch(`/jobs/${job}`, { method: "DELETE", headers: headers() });
    }
  });
  at("again").addEventListener("click", () => {
    at("ask").reset();
    show("ask");
    at("file").focus();
  });
  // A file that is dropped beside the field would replace the page.
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", name === "dragover");
    });
  }
  document.addEventListener("drop", (event) => {
    if (!at("ask").hidden && event.dataTransfer.files.length) sendFile(event.dataTransfer.files[0]);
  });

  // Back, in a browser that kept the page as it was.
  window.addEventListener("pageshow", (event) => {
    if (event.persisted && !job) show("ask");
  });

  const found = /^#job=([A-Za-z0-9_-]{1,64})$/.exec(location.hash);
  if (found) {
    job = found[1];
    begin(`Job ${job}`);
    step(STAGES.queued, null);
    follow();
  }
})();
