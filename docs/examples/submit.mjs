// Submit an upload and wait for its verdict, in Node without any package, over Redis' own protocol.
//
//     python -m ralf.worker.service.store > ralf.lua
//     node docs/examples/submit.mjs redis://USER:PASSWORD@HOST:6379/0 ralf.lua TOKEN URI [SECONDS]
//
// The address may also be unix:///path?username=…&password=… . Prints one JSON line about the
// submission, then one with the verdict. The same token and URI give the same job on every machine.
import { createHash, randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import net from "node:net";

const PREFIX = process.env.RALF_REDIS_PREFIX ?? "ralf:";
const FUNCTION = "ralf.worker.service.jobs.moderate";

// One connection; one command at a time.
class Redis {
  constructor(address) {
    const url = new URL(address);
    const unix = url.protocol === "unix:";
    this.socket = net.connect(unix ? url.pathname : { host: url.hostname, port: url.port || 6379 });
    this.user = decodeURIComponent(unix ? url.searchParams.get("username") ?? "" : url.username);
    this.password = decodeURIComponent(unix ? url.searchParams.get("password") ?? "" : url.password);
    this.database = unix ? "" : url.pathname.slice(1);
    this.buffer = Buffer.alloc(0);
    this.socket.on("data", (bytes) => {
      this.buffer = Buffer.concat([this.buffer, bytes]);
      this.read?.();
    });
    this.socket.on("error", (error) => this.fail?.(error));
    this.socket.on("close", () => this.fail?.(new Error("Redis closed the connection")));
  }

  async open() {
    if (this.password) await this.ask("AUTH", this.user || "default", this.password);
    if (this.database) await this.ask("SELECT", this.database);
    return this;
  }

  async ask(...words) {
    const parts = words.map((word) => Buffer.from(String(word)));
    const pieces = [Buffer.from(`*${parts.length}\r\n`)];
    for (const part of parts) pieces.push(Buffer.from(`$${part.length}\r\n`), part, Buffer.from("\r\n"));
    this.socket.write(Buffer.concat(pieces));
    const answer = await new Promise((resolve, reject) => {
      this.fail = reject;
      this.read = () => {
        const found = parse(this.buffer, 0);
        if (!found) return;
        this.buffer = this.buffer.subarray(found.end);
        this.read = this.fail = undefined;
        resolve(found.value);
      };
      this.read();
    });
    if (answer instanceof Error) throw answer;
    return answer;
  }

  close() {
    this.fail = undefined;
    this.socket.end();
  }
}

// Parse RESP2: returns {value, end}, or undefined while the answer is incomplete.
function parse(buffer, from) {
  const line = buffer.indexOf("\r\n", from);
  if (line < 0) return undefined;
  const text = buffer.toString("utf8", from + 1, line), next = line + 2;
  switch (String.fromCharCode(buffer[from])) {
    case "+": return { value: text, end: next };
    case "-": return { value: new Error(text), end: next };
    case ":": return { value: Number(text), end: next };
    case "$": {
      const size = Number(text);
      if (size < 0) return { value: null, end: next };
      if (buffer.length < next + size + 2) return undefined;
      return { value: buffer.toString("utf8", next, next + size), end: next + size + 2 };
    }
    case "*": {
      const values = [];
      let end = next;
      for (let count = Number(text); count > 0; count -= 1) {
        const one = parse(buffer, end);
        if (!one) return undefined;
        values.push(one.value);
        end = one.end;
      }
      return { value: values, end };
    }
    default: throw new Error(`not a Redis answer: ${text}`);
  }
}

async function submit(redis, script, token, uri, tenant = "default") {
  const asked = { schema: "ralf.job/1", token, tenant, priority: "default", media: { uri } };
  const hash = createHash("sha256").update(JSON.stringify(asked)).digest("hex");
  const id = randomUUID().replaceAll("-", "");
  const now = new Date().toISOString();
  const document = JSON.stringify({ ...asked, job_id: id, submitted_at: now });
  const call = ["0", "submit", "", id, hash, document, tenant, asked.priority, token, "", "", "", "",
    now.replace("Z", "000Z"), FUNCTION, ""];
  const sha = createHash("sha1").update(script).digest("hex");
  let answer;
  try {
    answer = await redis.ask("EVALSHA", sha, ...call);
  } catch (error) {
    if (!error.message.startsWith("NOSCRIPT")) throw error;
    answer = await redis.ask("EVAL", script, ...call);
  }
  const [kind, job_id, state] = answer;
  if (kind === "conflict") throw new Error(`token ${token} was used for another upload, job ${job_id}`);
  return { job_id, state, existing: kind === "existing" };
}

async function result(redis, id, seconds) {
  for (const end = Date.now() + seconds * 1000; Date.now() < end;) {
    const state = await redis.ask("HGET", `${PREFIX}job:${id}`, "state");
    if (state === "succeeded") return JSON.parse(await redis.ask("GET", `${PREFIX}verdict:${id}`));
    if (!["queued", "running"].includes(state)) {
      const failure = await redis.ask("HGET", `${PREFIX}job:${id}`, "failure");
      throw new Error(`job ${id} ended as ${state}: ${failure}`);
    }
    await new Promise((wake) => setTimeout(wake, 200));
  }
  throw new Error(`job ${id} did not end within ${seconds} s; it is still running`);
}

const [address, file, token, uri, seconds = "600"] = process.argv.slice(2);
if (!uri) {
  console.error("usage: submit.mjs REDIS_URL ralf.lua TOKEN URI [SECONDS]");
  process.exit(2);
}
const redis = await new Redis(address).open();
try {
  const made = await submit(redis, readFileSync(file, "utf8"), token, uri);
  console.log(JSON.stringify(made));
  console.log(JSON.stringify(await result(redis, made.job_id, Number(seconds))));
} catch (error) {
  console.error(`submit: ${error.message}`);
  process.exitCode = 1;
} finally {
  redis.close();
}
