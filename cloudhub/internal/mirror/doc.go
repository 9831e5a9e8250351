// Package mirror knows which objects each edge should hold and keeps every connected edge at that.
package mirror
