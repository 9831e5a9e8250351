// Package outbox is the durable log in which an edge keeps records until the cloud holds them.
package outbox
