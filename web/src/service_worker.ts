// Keeps the page's own files, so that it opens without a network, and adds the headers that threads need where the
// server does not send them. The model's files are kept by files.ts.

declare const FILES: string[];
declare const VERSION: string;
const STORE = `diffusers-far-page-${VERSION}`;
const worker = self as any; // TypeScript knows either pages or service workers

worker.addEventListener("install", (event: any) => {
  worker.skipWaiting();
  const requests = FILES.map((name) => new Request(name, { cache: "reload" }));
  event.waitUntil(caches.open(STORE).then((cache) => cache.addAll(requests)));
});

worker.addEventListener("activate", (event: any) => {
  const isOld = (name: string) => name.startsWith("diffusers-far-page-") && name !== STORE;
  const clean = caches.keys().then((names) => Promise.all(names.filter(isOld).map((name) => caches.delete(name))));
  event.waitUntil(clean.then(() => worker.clients.claim()));
});

worker.addEventListener("fetch", (event: any) => {
  const request: Request = event.request, url = new URL(request.url), scope: string = worker.registration.scope;
  const name = url.href.startsWith(scope) ? url.origin + url.pathname : "";
  const isOurs = FILES.some((file) => new URL(file, scope).href === name);
  if (request.method === "GET" && isOurs) event.respondWith(answer(request, name));
});

async function answer(request: Request, name: string): Promise<Response> {
  // What the server has now, so that a new version is seen at once.
  const reply = await fetch(request).catch(async () => (await caches.open(STORE)).match(name));
  if (!reply) return Response.error();
  const headers = new Headers(reply.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "cross-origin");
  return new Response(reply.body, { status: reply.status, statusText: reply.statusText, headers });
}
